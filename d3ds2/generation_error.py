"""The errors of a generation."""

from .storage.one_line import OneLineError


class GenerationError(OneLineError):
    """The networks ran, and made nothing that can become a mesh. The message is one line."""


class EmptyResultError(GenerationError):
    """A stage left nothing of some sample: no occupied voxel, or no surface."""


def empty_result(what: str, index: int, batch_size: int) -> EmptyResultError:
    which = f" {index + 1} of {batch_size}" if batch_size > 1 else ""
    return EmptyResultError(f"the {what} of image{which} came out empty; try another seed or image")
