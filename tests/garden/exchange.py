"""Reads and writes record files with TensorFlow Model Garden, in an environment of its own (requirements.txt).

python exchange.py read RECORDS FRAMES SIDE CLASSES CLIPS.npz    # decodes all records as its input pipeline does
python exchange.py write RECORDS COUNT CLASSES                   # writes records with the features that it requires
"""

import sys

import numpy as np
import tensorflow as tf
from official.vision.configs.video_classification import DataConfig
from official.vision.dataloaders import tfexample_utils, video_input


def read(records: str, frames: int, side: int, classes: int, output: str) -> None:
    """Saves the clip, [frames, side, side, 3] in 0..1, and the one-hot label of each record."""
    config = DataConfig(
        feature_shape=(frames, side, side, 3), min_image_size=side, num_classes=classes, is_training=False
    )
    decoder, parse = video_input.Decoder(), video_input.Parser(config).parse_fn(is_training=False)
    parsed = [parse(decoder.decode(record)) for record in tf.data.TFRecordDataset(records)]
    clips, labels = [features["image"].numpy() for features, _ in parsed], [label.numpy() for _, label in parsed]
    np.savez(output, clips=clips, labels=labels)


def write(records: str, count: int, classes: int) -> None:
    """Writes videos of 8 frames. Frame t of record n has the grey value 10 n + t; its class is n modulo `classes`."""
    examples = []
    for number in range(count):
        example = tf.train.SequenceExample()
        tfexample_utils.put_int64_to_context(example, number % classes)
        for time in range(8):
            image = np.full((40, 52, 3), 10 * number + time, np.uint8)
            jpeg = tfexample_utils.encode_image(image, "JPEG")
            tfexample_utils.put_bytes_list_to_feature(example, jpeg, repeat_num=1)
        examples.append(example)
    tfexample_utils.dump_to_tfrecord(records, examples)


if __name__ == "__main__":
    action, path, *others = sys.argv[1:]
    numbers = [int(word) if word.isdigit() else word for word in others]
    {"read": read, "write": write}[action](path, *numbers)  # type: ignore[operator]
