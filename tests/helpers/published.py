"""Sizes that the papers print, in millions of parameters.

One table for all tests: formulas are held to it, and so are the shapes of the
models that are built.
"""

# CartesianMoE (arXiv 2410.16077): total and active. Of SMoE-Top3 and TopP it
# gives none; they are made to have SMoE-Share's total.
CARTESIAN = {
  'base': (842.0, 247.5),
  'base,smoe_share': (842.0, 247.4),
  'base,fine_grained': (842.0, 247.5),
  'base,smoe_top3': (842.0, None),
  'base,top_p': (842.0, None),
  'base,no_shared': (799.6, 205.0),
  'base,dense': (162.4, 162.4),
  'large': (2884.6, 770.7),
  'large,smoe_share': (2884.4, 770.5),
  'large,fine_grained': (2884.6, 770.7),
  'large,smoe_top3': (2884.4, None),
  'large,top_p': (2884.4, None),
  'large,no_shared': (2733.6, 619.6),
  'large,dense': (468.2, 468.2),
}

# In billions, to two digits; the sizes behind them are ours.
SEVEN_B = (7.25, 1.61)

# RMoE (arXiv 2408.06793), to two digits.
RMOE = {
  'enwik8_small': '15.61',
  'enwik8_small,smoe': '15.32',
  'enwik8_small,smoe_mlp': '15.73',
  'enwik8_medium': '36.51',
  'enwik8_medium,np': '36.51',
  'enwik8_medium,detach': '36.51',
  'enwik8_medium,smoe': '36.08',
  'enwik8_medium,smoe_mlp': '36.79',
  'enwik8_medium,hyper': '48.41',
  'enwik8_medium,random': '36.08',
  'enwik8_medium,cosine': '36.08',
  'enwik8_medium,xmoe': '36.13',
  'enwik8_medium,s_proj': '36.23',
  'enwik8_medium,rnn': '36.44',
  'enwik8_medium,lstm': '36.54',
}
ENWIK8_SYMBOLS = 205  # 204 in the text, and <eos>
