"""The linear layer of the transformers: torch's, with the training pass of kernels/linear.py."""

from torch import Tensor, nn

from ..kernels.linear import linear, projections, trains_by_hand


class Linear(nn.Linear):
    """x weightᵀ + bias: (..., C) -> (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def project(x: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """Apply several layers without bias to x (N, C), in training in few products: (N, O) each."""
    if trains_by_hand(x) and are_plain(layers):
        return projections(x, [layer.weight for layer in layers])
    return [layer(x) for layer in layers]


def are_plain(layers: list[nn.Module]) -> bool:
    """Whether their parameters say all that layers do. An adapter, such as LoRA, takes the place of a layer."""
    return all(type(layer) is Linear for layer in layers)
