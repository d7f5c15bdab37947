"""The text of a small program of a GPU."""

# Of a step that XLA compiled for an H100: six layers in a loop, four sequences
# of 32 tokens, heads of 16; lines are shortened.
GPU_PROGRAM = r"""HloModule jit_train_step, is_scheduled=true

%gemm (p0: bf16[128,64], p1: bf16[64,96]) -> bf16[128,96] {
  %p0 = bf16[128,64]{1,0} parameter(0)
  %p1 = bf16[64,96]{1,0} parameter(1)
  ROOT %dot.1 = bf16[128,96]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%usual (a: bf16[8,128,64]) -> f32[] {
  %a = bf16[8,128,64]{2,1,0} parameter(0)
  %dot.2 = f32[8,128,128]{2,1,0} dot(%a, %a), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  ROOT %c0 = f32[] constant(0)
}

%rare (b: bf16[8,128,64]) -> f32[] {
  %b = bf16[8,128,64]{2,1,0} parameter(0)
  %dot.3 = f32[8,128,128]{2,1,0} dot(%b, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  %dot.4 = f32[8,128,128]{2,1,0} dot(%b, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  ROOT %c1 = f32[] constant(0)
}

%body (t: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %x = bf16[128,64]{1,0} get-tuple-element(%t), index=1
  %w = bf16[64,96]{1,0} constant({...})
  %q = bf16[4,32,2,16]{3,2,1,0} bitcast(%x)
  %banks = bf16[8,64,80]{2,1,0} constant({...})
  %sizes = s32[8]{0} constant({...})
  %projected = bf16[128,96]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %fwd = (bf16[4,2,32,16]{3,1,2,0}, f32[4,2,32]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="attention"}
  %bwd = (bf16[4,2,32,16]{3,1,2,0}, bf16[4,2,32,16]{3,1,2,0}, bf16[4,2,32,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %q, /*index=4*/%q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %rows = bf16[128,80]{1,0} custom-call(%x, %banks, %sizes, %sizes), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="tokamax:{\"op\":{\"__type\":\"PallasTritonRaggedDot\"}}/pallas_call"}
  %weights = bf16[8,64,80]{2,1,0} custom-call(%x, %rows, %sizes, %sizes), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="tokamax:{\"op\":{\"__type\":\"PallasTritonRaggedDot\"}}/pallas_call"}
  %other = bf16[128,64]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="a kernel of others"}
}

%condition (t: (s32[], bf16[128,64])) -> pred[] {
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[8,128,64]) -> f32[] {
  %p = bf16[8,128,64]{2,1,0} parameter(0)
  %start = (s32[], bf16[128,64]{1,0}) tuple(%p)
  %loop = (s32[], bf16[128,64]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %c = f32[] conditional(%p, %p, %p), true_computation=%usual, false_computation=%rare
}
"""  # noqa: E501
