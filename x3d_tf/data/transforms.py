"""Clip transforms that apply equally to all frames, in a tf.data graph or eagerly.

A clip is [frames, height, width, 3] RGB in 0..255, uint8 as decoded and float32 after the first transform. Values are
neither rounded nor normalised; the model normalises them.
"""

import tensorflow as tf
import tensorflow.experimental.numpy as tnp

from x3d_tf.data.sampling import crop_offsets, resized_shape


def resize(clip: tf.Tensor, short_side: int | tf.Tensor, stretch: bool = False) -> tf.Tensor:
    """Scales the short side to `short_side` pixels, int or int64 scalar; the long side is rounded down.

    With `stretch`, both sides are scaled to `short_side`, ignoring the aspect ratio. Interpolation is bilinear with
    half-pixel centres and without antialiasing, like torch's `interpolate(align_corners=False)`.
    """
    shape, side = tf.shape(clip, tf.int64), tf.cast(short_side, tf.int64)
    height, width = (side, side) if stretch else resized_shape(shape[1], shape[2], side, xp=tnp)
    resized = tf.image.resize(clip, tf.cast(tf.stack([height, width]), tf.int32), method="bilinear", antialias=False)
    return tf.cast(resized, tf.float32)


def random_crop(clip: tf.Tensor, size: int, randoms: tf.Tensor) -> tf.Tensor:
    """Crops a square of `size` pixels at a random position.

    Args:
        clip: clip whose sides are at least `size`.
        size: side of the square in pixels.
        randoms: two numbers in [0, 1), float64 [2]. If uniform, all positions are equally likely, including the bottom
            and right edges, which PySlowFast excludes.
    """
    return crop(clip, *random_crop_position(clip, size, randoms), size)


def random_crop_position(clip: tf.Tensor, size: int, randoms: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns top and left of the square of `random_crop`, int32 scalars."""
    positions = tf.shape(clip)[1:3] - size + 1
    top, left = tf.unstack(tf.cast(tf.floor(randoms * tf.cast(positions, tf.float64)), tf.int32))
    return top, left


def flip(clip: tf.Tensor, flipped: tf.Tensor) -> tf.Tensor:
    """Flips the clip horizontally if the bool scalar `flipped` is True."""
    return tf.cond(flipped, lambda: clip[:, :, ::-1], lambda: clip)


def view_crop(clip: tf.Tensor, size: int, spatial_crops: int = 1, number: int | tf.Tensor = 0) -> tf.Tensor:
    """Crops one of `spatial_crops` squares: the centre, or the left, centre or right one.

    Of upright clips the three squares are top, centre and bottom.

    Args:
        clip: clip whose sides are at least `size`.
        size: side of the squares in pixels.
        spatial_crops: number of squares, 1 or 3.
        number: number of the square, from 0, an int scalar.

    Returns:
        [frames, size, size, 3]
    """
    shape = tf.shape(clip, tf.int64)
    offsets = tf.stack(crop_offsets(shape[1], shape[2], size, spatial_crops, xp=tnp))
    return crop(clip, offsets[number, 0], offsets[number, 1], size)


def crop(clip: tf.Tensor, top: tf.Tensor, left: tf.Tensor, size: int) -> tf.Tensor:
    """Crops the square of `size` pixels with first row `top` and first column `left`."""
    square = clip[:, top : top + size, left : left + size]
    return tf.ensure_shape(square, (clip.shape[0], size, size, 3))
