"""Records of key frames: what training and evaluating a detector require of them. Imports no TensorFlow."""

from x3d_tf.data.ava_files import EVALUATED, ava_actions
from x3d_tf.data.records.index import KeyFrameInfo
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError, require


def key_frames_of(manifest: Manifest) -> KeyFrameInfo:
    """Returns the properties of a manifest's key frames; raises `UserError` if its records have none."""
    if manifest.key_frames is None:
        raise UserError(
            f"{manifest.folder} holds videos without key frames: build records of key frames with build_records --boxes"
        )
    return manifest.key_frames


def require_proposals(manifest: Manifest, split: str, setting: str = "Detection.eval_boxes") -> None:
    """Raises `UserError` if the records of a split were built without the boxes of a person detector.

    Args:
        manifest: the manifest of the records.
        split: name of the split.
        setting: name of the setting that requires these boxes, for the message.
    """
    known = split in key_frames_of(manifest).proposals
    rule = f'be "annotated" for split {split!r} of {manifest.folder}, which was built without --proposals'
    require(known, setting, rule, "proposals")


def validation_key_frames(manifest: Manifest, split: str, every: int) -> Manifest:
    """Returns the manifest with only those key frames of a split that validations during training use.

    Args:
        manifest: the manifest of the records.
        split: name of the split.
        every: seconds between two such key frames, `Detection.validation_every`.

    Raises:
        UserError: the split has no such key frames.
    """
    records = manifest.split(split).records
    selected = [record for record in records if (record.key_frame or 0) % every == 0]
    if not selected:
        seconds = f" at a multiple of Detection.validation_every = {every} seconds" if every > 1 else ""
        raise UserError(f"validation split {split!r} of {manifest.folder} must have at least one key frame{seconds}")
    return manifest.with_records(split, selected)


def require_boxes(manifest: Manifest, split: str) -> None:
    """Raises `UserError` unless a split has annotated boxes of the evaluated actions: mAP is undefined without."""
    labels = {label for record in manifest.split(split).records for label in record.labels}
    found = any(number - 1 in labels for number in actions_to_evaluate(manifest.classes))
    require(found, f"split {split!r} of {manifest.folder}", "have annotated boxes of the evaluated actions")


def actions_to_evaluate(classes: tuple[str, ...]) -> dict[int, str]:
    """Returns the numbers, from 1, and names of the actions to evaluate: AVA's 60, or else all classes."""
    if classes == tuple(ava_actions().values()):
        return {number: classes[number - 1] for number in sorted(EVALUATED)}
    return dict(enumerate(classes, 1))
