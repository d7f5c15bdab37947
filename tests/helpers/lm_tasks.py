"""Tasks of lm-evaluation-harness in files of their own."""

import json
from pathlib import Path
from typing import Any


def write(
  folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any
) -> None:
  """Writes a task whose documents are `rows`; JSON is YAML, too."""
  data = folder / f'{name}.jsonl'
  data.write_text('\n'.join(json.dumps(row) for row in rows), 'utf-8')
  task = {
    'task': name,
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(data)}},
    'test_split': 'test',
    'doc_to_text': '{{text}}',
    'doc_to_target': '{{target}}',
  }
  (folder / f'{name}.yaml').write_text(json.dumps(task | fields), 'utf-8')


def multiple_choice(
  folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any
) -> None:
  """Of rows with `text`, `choices` and the number of the right one."""
  metrics = [{'metric': metric} for metric in ('acc', 'acc_norm', 'acc_bytes')]
  write(
    folder,
    name,
    rows,
    output_type='multiple_choice',
    doc_to_choice='{{choices}}',
    metric_list=metrics,
    **fields,
  )


def rolling(folder: Path, name: str, texts: list[str]) -> None:
  """Of whole texts."""
  write(
    folder,
    name,
    [{'text': text} for text in texts],
    output_type='loglikelihood_rolling',
    doc_to_text='',
    doc_to_target='{{text}}',
    metric_list=[{'metric': 'bits_per_byte'}],
  )


def generation(
  folder: Path,
  name: str,
  prompts: list[str],
  filter_list: list[dict[str, Any]] | None = None,
  **wanted: Any,
) -> None:
  """Of prompts to go on with, as `generation_kwargs` say."""
  filters = {'filter_list': filter_list} if filter_list else {}
  write(
    folder,
    name,
    [{'text': prompt, 'target': 'x'} for prompt in prompts],
    output_type='generate_until',
    generation_kwargs=wanted,
    metric_list=[{'metric': 'exact_match'}],
    **filters,
  )
