"""Names of records, and the plan of the shards."""

from x3d_tf.data.records.index import media_id, plan_shards


def test_names_state_the_segment_or_the_key_frame() -> None:
    assert media_id("a#b-c/d.mp4") == "a#b-c/d.mp4"
    assert media_id("a.mp4", 0.5) == "a.mp4#0.5-"
    assert media_id("a.mp4", 0.0, 3.0) == "a.mp4#0.0-3.0"
    assert media_id("a.mp4", 1e-05, 1e20) == "a.mp4#1e-05-1e+20"
    assert media_id("a,film", key_frame=902) == "a,film,0902"


def test_shards_cover_all_videos_once() -> None:
    plan = plan_shards("train", 130)
    assert [name for name, _ in plan] == [f"train-0000{i}-of-00003.tfrecord" for i in range(3)]
    assert [[*range(130)][part] for _, part in plan] == [[*range(64)], [*range(64, 128)], [128, 129]]
