"""The kernels that torch.compile leaves alone: it breaks its graph there and runs the kernels as they are.

Imported only while it compiles: `torch.compiler.disable` takes seconds to import.
"""

import torch

from . import compression_triton
from .spatial_sparse_attention_triton import spatial_attention_triton as _spatial_attention_triton

spatial_attention_triton = torch.compiler.disable(_spatial_attention_triton)
pooled_silu_triton = torch.compiler.disable(compression_triton.pooled_silu_triton)
pooled_conv_compression_triton = torch.compiler.disable(compression_triton.pooled_conv_compression_triton)
