"""Image -> the object cut out of its background, and its mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from comfy_api.latest import io
from PIL import Image, ImageChops

from .comfy.errors import plain_errors, without_tags
from .comfy.sockets import CATEGORY, BackgroundRemovalSocket

if TYPE_CHECKING:
    import torch

METHODS = ("auto", "mask", "alpha", "model", "rembg", "plain")
INVERT_MASK = ("auto", "no", "yes")
BORDER_SHARE = 0.5  # of the border: a mask that covers more of it is 1 around the object


class RemoveBackground(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D3DS2RemoveBackground",
            display_name="Remove Background (Direct3D-S2)",
            category=CATEGORY,
            description="Cuts the object out of its background. `auto` uses the first of these that is "
            "available: the mask, the image's own alpha channel, the background removal model, rembg, a "
            "plain background.",
            search_aliases=["background removal", "cut out", "matting", "rembg", "alpha", "d3ds2"],
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch, with one object in each."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="1 on the object and 0 around it, or the other way round, as Load Image gives it.",
                ),
                BackgroundRemovalSocket.Input(
                    "background_removal",
                    optional=True,
                    tooltip="From ComfyUI's Load Background Removal Model. The methods `auto` and `model` use it.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="auto",
                    tooltip="How to find the object. `rembg` needs the rembg package and its model file, because "
                    "nothing is downloaded. `plain` removes a plain background, starting from the border of the "
                    "picture.",
                ),
                io.Combo.Input(
                    "invert_mask",
                    options=list(INVERT_MASK),
                    default="auto",
                    tooltip="Whether the mask is 1 around the object. `auto` takes the border of the picture for "
                    "background; the status line says which way the mask was read.",
                ),
                io.Float.Input(
                    "foreground_ratio",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The object is centred in a square. This is its longer side as a fraction of the "
                    "square's side; 0 keeps the picture's own framing.",
                ),
            ],
            outputs=[
                io.Image.Output("cut_out", display_name="image", tooltip="The object with an alpha channel (RGBA)."),
                io.Mask.Output("object_mask", display_name="mask", tooltip="1 on the object, 0 around it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, invert_mask: str | bool | None, method: str | None = None) -> bool | str:
        """Refuse rembg where it is not installed, before the prompt runs; None is a value that another node will give.

        The booleans of workflows that were saved when invert_mask was a switch are accepted.
        """
        from ..d3ds2.images.foreground import missing_for_rembg

        if method not in (None, *METHODS):
            return without_tags(f"expected a method of {', '.join(METHODS)}, got {method!r}")
        if not isinstance(invert_mask, bool) and invert_mask not in (None, *INVERT_MASK):
            return without_tags(f"expected invert_mask of {', '.join(INVERT_MASK)}, got {invert_mask!r}")
        reason = missing_for_rembg() if method == "rembg" else None
        return True if reason is None else f"method is `rembg`, but {reason}. {_ADVICE['rembg']}"

    @classmethod
    @plain_errors
    def execute(
        cls, image, method, invert_mask, foreground_ratio, mask=None, background_removal: Any = None
    ) -> io.NodeOutput:
        """Cut the object out of each picture. Raises ValueError, with advice, if none is found."""
        from ..d3ds2.images.foreground import centre_object, cut_out
        from ..d3ds2.images.image_file import ImageError
        from .comfy.pictures import to_images, to_masks, to_pictures
        from .comfy.progress import Progress, run_cancellable
        from .comfy.samples import sample

        pictures = to_pictures(image)
        masks, turned = _masks_for(image, mask, invert_mask, method)
        progress = Progress(cls.hidden.unique_id, len(pictures))
        objects, lines = [], []
        for index, picture in enumerate(pictures):
            used = _choose(method, picture, bool(masks), background_removal is not None)
            which = f"picture {index + 1}/{len(pictures)}: {used}"
            if used == "mask" and turned[index % len(masks)]:
                which += ", inverted: it was 1 around the object"
            progress.status(which)
            lines.append(which)

            def notify(line: str) -> None:
                lines[-1] += f"; {line}"
                progress.status(lines[-1])

            with sample(index, len(pictures)):
                try:
                    if used == "mask":
                        cut = cut_out(picture, masks[index % len(masks)].resize(picture.size), notify=notify)
                    elif used == "model":
                        found = to_masks(background_removal.encode_image(image[index : index + 1, ..., :3]))[0]
                        cut = cut_out(picture, found.resize(picture.size), notify=notify)
                    else:
                        cut = run_cancellable(cut_out, picture, method=used, notify=notify)
                except ImageError as error:
                    raise ValueError(f"{error}. {_ADVICE[used]}") from None
            if foreground_ratio:
                cut = centre_object(cut, max(picture.size), foreground_ratio)
            objects.append(cut)
            progress.update(index + 1)
        object_masks = [cut.getchannel("A") for cut in objects]
        return io.NodeOutput(to_images(objects), to_images(object_masks), ui=progress.result(*lines))


_ADVICE = {
    "mask": "Connect a mask that is 1 on the object, or one that is 1 around it with invert_mask `auto` or `yes`.",
    "alpha": "Connect an IMAGE with four channels, or choose another method.",
    "model": "Use a picture of a single object, or connect a mask.",
    "rembg": "Connect a mask, or ComfyUI's Load Background Removal Model.",
    "plain": "Connect a mask, or ComfyUI's Load Background Removal Model.",
}


def _masks_for(
    image: torch.Tensor, mask: torch.Tensor | None, invert: str | bool, method: str
) -> tuple[list[Image.Image], list[bool]]:
    """Return masks as pictures of mode L, white on the object, and whether each was inverted.

    There is one, or one for each image; none if no mask is used. Raises ValueError for any other number of masks.
    """
    from .comfy.pictures import to_masks

    if mask is None or method not in ("auto", "mask"):
        return [], []
    masks = mask[None] if mask.ndim == 2 else mask
    # what Load Image gives for a picture without alpha: it marks no object
    if method == "auto" and masks.shape[1:] == (64, 64) != image.shape[1:3] and not masks.any():
        return [], []
    if len(masks) not in (1, len(image)):
        raise ValueError(f"expected 1 mask or {len(image)}, one for each image, got {len(masks)}")
    pictures = to_masks(masks)
    if invert == "auto":
        turned = [_covers_border(picture) for picture in pictures]
    else:
        turned = [invert in ("yes", True)] * len(pictures)
    return [
        ImageChops.invert(picture) if turn else picture for picture, turn in zip(pictures, turned, strict=True)
    ], turned


def _covers_border(mask: Image.Image) -> bool:
    """Whether a mask covers most of the picture's border, so that it marks the background."""
    samples = np.asarray(mask)
    edges = np.concatenate([samples[0], samples[-1], samples[:, 0], samples[:, -1]])
    return bool((edges > 127).mean() > BORDER_SHARE and samples.min() < 128)


def _choose(method: str, picture: Image.Image, has_mask: bool, has_model: bool) -> str:
    """Return the method for a picture. Raises ValueError if a method needs an input that is not connected."""
    from ..d3ds2.images.alpha import tells_object
    from ..d3ds2.images.foreground import why_rembg_cannot_run

    if method == "mask" and not has_mask:
        raise ValueError("method is `mask`, but no mask is connected: connect one, or choose `auto`.")
    if method == "model" and not has_model:
        raise ValueError(
            "method is `model`, but no background removal model is connected: connect ComfyUI's Load Background "
            "Removal Model, or choose `auto`."
        )
    if method != "auto":
        return method
    if has_mask:
        return "mask"
    if picture.mode == "RGBA" and tells_object(picture):
        return "alpha"
    if has_model:
        return "model"
    return "rembg" if why_rembg_cannot_run() is None else "plain"
