"""Operations on a clip in a tf.data graph or eagerly; each treats all frames alike.

A clip is [frames, height, width, 3] RGB in 0..255, uint8 as decoded and float32 from the first operation on. Values are
neither rounded nor normalised: the model normalises.
"""

import tensorflow as tf
import tensorflow.experimental.numpy as tnp

from x3d_tf.data.sampling import crop_offsets, resized_shape


def resize(clip: tf.Tensor, short_side: int | tf.Tensor, stretch: bool = False) -> tf.Tensor:
    """Scales the short side to `short_side` pixels, int or int64 scalar; the long side is rounded down.

    With `stretch` the long side is scaled to the same length: the frame becomes a square.

    Bilinear with half-pixel centres and without antialiasing, which is torch's `interpolate(align_corners=False)`.
    """
    shape, side = tf.shape(clip, tf.int64), tf.cast(short_side, tf.int64)
    height, width = (side, side) if stretch else resized_shape(shape[1], shape[2], side, xp=tnp)
    resized = tf.image.resize(clip, tf.cast(tf.stack([height, width]), tf.int32), method="bilinear", antialias=False)
    return tf.cast(resized, tf.float32)


def random_crop(clip: tf.Tensor, size: int, chance: tf.Tensor) -> tf.Tensor:
    """Cuts a square of `size` pixels out at a random place.

    Args:
        clip: no side shorter than `size`.
        size: side of the square.
        chance: two numbers in [0, 1), float64 [2]; uniform ones make all places equally likely, those at the bottom and
            right edges too (which PySlowFast leaves out).
    """
    return crop(clip, *random_place(clip, size, chance), size)


def random_place(clip: tf.Tensor, size: int, chance: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Top and left of the square that `random_crop` cuts out, int32."""
    room = tf.shape(clip)[1:3] - size + 1
    top, left = tf.unstack(tf.cast(tf.floor(chance * tf.cast(room, tf.float64)), tf.int32))
    return top, left


def flip(clip: tf.Tensor, mirrored: tf.Tensor) -> tf.Tensor:
    """Swaps left and right if the bool scalar `mirrored` says so."""
    return tf.cond(mirrored, lambda: clip[:, :, ::-1], lambda: clip)


def crops(clip: tf.Tensor, size: int, spatial_crops: int) -> tf.Tensor:
    """Cuts out the centre square, or the left, centre and right (of upright clips top, centre and bottom) ones.

    Returns:
        [spatial_crops, frames, size, size, 3]
    """
    shape = tf.shape(clip, tf.int64)
    places = crop_offsets(shape[1], shape[2], size, spatial_crops, xp=tnp)
    return tf.stack([crop(clip, top, left, size) for top, left in places])


def crop(clip: tf.Tensor, top: tf.Tensor, left: tf.Tensor, size: int) -> tf.Tensor:
    """Cuts out the square of `size` pixels whose first row and column are `top` and `left`."""
    cut = clip[:, top : top + size, left : left + size]
    return tf.ensure_shape(cut, (clip.shape[0], size, size, 3))
