"""RoIAlign (He et al. 2017, "Mask R-CNN", section 3) in `keras.ops`, by the rule of torchvision's `roi_align`."""

from typing import Any

from keras import ops

REGION_BINS = 7  # along each axis (PySlowFast `DETECTION.ROI_XFORM_RESOLUTION`)
_STRIDE = 32  # pixels of a clip in a cell of res5, also where the last cell reaches past the clip


def regions(maps: Any, boxes: Any, height: Any, width: Any) -> Any:
    """The last feature maps in boxes of the clip, by `roi_align` with half-cell positions.

    Args:
        maps: of res5 or conv5, (N, H, W, C), floating point.
        boxes: (N, B, 4): x1, y1, x2, y2 in [0, 1] of the clip, to which they are clipped.
        height, width: of the clip, in pixels.

    Returns:
        (N, B, 7, 7, C); 0 for a box without width or height.
    """
    sides = ops.cast(ops.stack([width, height, width, height]), maps.dtype)
    boxes = ops.minimum(ops.maximum(ops.cast(boxes, maps.dtype), 0.0), 1.0) * sides  # a node "clip" is the input's name
    return roi_align(maps, boxes, size=REGION_BINS, scale=1 / _STRIDE)


def roi_align(
    features: Any, boxes: Any, *, size: int, scale: float, aligned: bool = True, samples: int | None = None
) -> Any:
    """Means of bilinear samples of feature maps on a grid of bins in each box.

    A bin of a box has ceil(side / size) samples along an axis, side in cells of the map. Samples further than a cell
    outside the map count as 0; others are taken at its nearest position. A box without width or height gives 0.

    What one axis contributes does not depend on the other, so a box's bins are a product of two matrices with the map:
    no sample is gathered, and the gradient is as fast. Any number of boxes, all maps in one graph.

    Args:
        features: maps (N, H, W, C), floating point; H and W may be open.
        boxes: (N, B, 4), floating point: x1, y1, x2, y2, times `scale` in cells of the map.
        size: bins along each axis.
        scale: cells of the map in a unit of the boxes, 1/32 for pixels of a clip.
        aligned: whether positions are moved by half a cell, so that they are those of cells' centres; without, boxes
            have a width and height of a cell at least (torchvision's option of that name).
        samples: most samples of a bin along an axis; as many as a box of the whole map needs unless given. Boxes that
            need more are sampled wrongly.

    Returns:
        (N, B, size, size, C).
    """
    boxes = ops.cast(boxes, features.dtype) * scale
    height, width = _sides(features)
    rows = _weights(boxes[..., 1], boxes[..., 3], height, size, aligned, samples)  # (N, B, size, H)
    columns = _weights(boxes[..., 0], boxes[..., 2], width, size, aligned, samples)  # (N, B, size, W)
    return ops.einsum("nbjw,nbiwc->nbijc", columns, ops.einsum("nbih,nhwc->nbiwc", rows, features))


def _sides(features: Any) -> tuple[Any, Any]:
    """Height and width, numbers where they are known."""
    return tuple(
        static if static is not None else ops.shape(features)[axis]
        for axis, static in ((1, features.shape[1]), (2, features.shape[2]))
    )


def _weights(start: Any, end: Any, cells: Any, size: int, aligned: bool, samples: int | None) -> Any:
    """How much each cell along an axis counts in each bin of each box, (N, B, size, cells).

    Args:
        start, end: of the boxes along the axis, (N, B), in cells.
        cells: of the map.
        size, aligned, samples: as of `roi_align`.
    """
    dtype = start.dtype
    start = start - 0.5 if aligned else start
    length = end - 0.5 - start if aligned else ops.maximum(end - start, 1.0)
    count = ops.expand_dims(ops.ceil(length / size), (-1, -2))  # (N, B, 1, 1) samples of a bin
    most = -(-cells // size) if samples is None else samples
    bins = ops.reshape(ops.arange(size, dtype=dtype), (size, 1))
    sample = ops.expand_dims(ops.arange(most, dtype=dtype), 0)
    # Constants stand second, for a constant's own operators do not take symbols of Keras.
    place = (1 / ops.maximum(count, 1.0) * (sample + 0.5) + bins) / size
    position = ops.expand_dims(start, (-1, -2)) + place * ops.expand_dims(length, (-1, -2))  # (N, B, size, samples)
    # beyond the number of samples, and off the map
    counts = ops.logical_and(count > sample, ops.logical_and(position >= -1.0, position <= ops.cast(cells, dtype)))
    inside = ops.minimum(ops.maximum(position, 0.0), ops.cast(cells - 1, dtype))
    distance = ops.expand_dims(inside, -1) - ops.arange(cells, dtype=dtype)
    weights = ops.relu(1.0 - ops.abs(distance)) * ops.cast(ops.expand_dims(counts, -1), dtype)
    return ops.sum(weights, axis=-2) / ops.maximum(count, 1.0)
