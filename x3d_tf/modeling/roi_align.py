"""RoIAlign (He et al. 2017, "Mask R-CNN", section 3) in `keras.ops`, equivalent to torchvision's `roi_align`."""

from typing import Any

from keras import ops

from x3d_tf.modeling.architecture import MAP_STRIDE, REGION_BINS


def regions(maps: Any, boxes: Any, height: Any, width: Any) -> Any:
    """Pools the last feature maps in boxes of the clip, using `roi_align` with half-cell alignment.

    Args:
        maps: feature maps of the last stage or conv5, (N, H, W, C), floating point.
        boxes: (N, B, 4): x1, y1, x2, y2 in [0, 1] of the clip. Values outside this range are clipped.
        height, width: size of the clip in pixels.

    Returns:
        (N, B, 7, 7, C); 0 for boxes without width or height.
    """
    sides = ops.cast(ops.stack([width, height, width, height]), maps.dtype)
    # Not ops.clip, because the network's input has the name "clip".
    boxes = ops.minimum(ops.maximum(ops.cast(boxes, maps.dtype), 0.0), 1.0) * sides
    return roi_align(maps, boxes, size=REGION_BINS, scale=1 / MAP_STRIDE)


def roi_align(
    features: Any, boxes: Any, *, size: int, scale: float, aligned: bool = True, samples: int | None = None
) -> Any:
    """Averages bilinear samples of feature maps over a grid of bins in each box.

    A bin has ceil(side / size) samples along an axis, where `side` is the side of its box in cells of the map. Samples
    more than one cell outside the map are 0; others outside are taken at the nearest position in the map. Boxes without
    width or height give 0.

    The weights of the two axes are independent, so the bins of a box are a product of two matrices with the map. This
    avoids gathering samples, which makes the gradient equally fast. It supports any number of boxes and maps in one
    graph.

    Args:
        features: feature maps (N, H, W, C), floating point; H and W may be dynamic.
        boxes: (N, B, 4), floating point: x1, y1, x2, y2; multiplied by `scale` they are in cells of the map.
        size: number of bins along each axis.
        scale: cells of the map per unit of the boxes; 1/32 for boxes in pixels of a clip.
        aligned: whether positions are shifted by half a cell, to the centres of the cells. Otherwise boxes are at least
            one cell wide and high. Same as torchvision's option.
        samples: maximum number of samples per bin and axis. Defaults to what a box as large as the map requires; boxes
            that require more get wrong values.

    Returns:
        (N, B, size, size, C).
    """
    boxes = ops.cast(boxes, features.dtype) * scale
    height, width = _sides(features)
    rows = _weights(boxes[..., 1], boxes[..., 3], height, size, aligned, samples)  # (N, B, size, H)
    columns = _weights(boxes[..., 0], boxes[..., 2], width, size, aligned, samples)  # (N, B, size, W)
    return ops.einsum("nbjw,nbiwc->nbijc", columns, ops.einsum("nbih,nhwc->nbiwc", rows, features))


def _sides(features: Any) -> tuple[Any, Any]:
    """Returns height and width, as numbers if they are static."""
    return tuple(
        static if static is not None else ops.shape(features)[axis]
        for axis, static in ((1, features.shape[1]), (2, features.shape[2]))
    )


def _weights(start: Any, end: Any, cells: Any, size: int, aligned: bool, samples: int | None) -> Any:
    """Computes the weight of each cell along an axis in each bin of each box, (N, B, size, cells).

    Args:
        start, end: ends of the boxes along the axis, (N, B), in cells.
        cells: number of cells of the map along the axis.
        size, aligned, samples: as in `roi_align`.
    """
    dtype = start.dtype
    start = start - 0.5 if aligned else start
    length = end - 0.5 - start if aligned else ops.maximum(end - start, 1.0)
    count = ops.expand_dims(ops.ceil(length / size), (-1, -2))  # (N, B, 1, 1) samples per bin
    max_samples = -(-cells // size) if samples is None else samples
    bins = ops.reshape(ops.arange(size, dtype=dtype), (size, 1))
    sample = ops.expand_dims(ops.arange(max_samples, dtype=dtype), 0)
    # Constants are the second operands, because the operators of constants do not accept Keras' symbolic tensors.
    fraction = (1 / ops.maximum(count, 1.0) * (sample + 0.5) + bins) / size
    position = ops.expand_dims(start, (-1, -2)) + fraction * ops.expand_dims(length, (-1, -2))  # (N, B, size, samples)
    # Excludes samples beyond the box's number of samples, and samples outside the map.
    is_valid = ops.logical_and(count > sample, ops.logical_and(position >= -1.0, position <= ops.cast(cells, dtype)))
    clamped = ops.minimum(ops.maximum(position, 0.0), ops.cast(cells - 1, dtype))
    distance = ops.expand_dims(clamped, -1) - ops.arange(cells, dtype=dtype)
    weights = ops.relu(1.0 - ops.abs(distance)) * ops.cast(ops.expand_dims(is_valid, -1), dtype)
    return ops.sum(weights, axis=-2) / ops.maximum(count, 1.0)
