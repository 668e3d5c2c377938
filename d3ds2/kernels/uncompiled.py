"""The kernels that torch.compile leaves alone: it breaks the graph there, and they run as they are.

This module is imported only inside torch.compile, because `torch.compiler.disable` takes seconds to import.
"""

import torch

from . import compression_triton as compression
from . import spatial_sparse_attention_triton as attention

spatial_sparse_attention_triton = torch.compiler.disable(attention.spatial_sparse_attention_triton)
pooled_silu_triton = torch.compiler.disable(compression.pooled_silu_triton)
pooled_conv_compression_triton = torch.compiler.disable(compression.pooled_conv_compression_triton)
