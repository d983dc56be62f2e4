"""Points of the paper's Figures 2, 3 and A.4, as far as the paper prints their accuracies. Imports no TensorFlow."""

from collections.abc import Iterable, Iterator

from x3d_tf.evaluation.published import FIGURE_2_STEP_1, FIGURE_3, TABLE_1, TABLE_2, Row
from x3d_tf.plots import PaperPoint


def _clip_points(rows: Iterable[Row], *, joined: bool = False) -> Iterator[PaperPoint]:
    """Yields top-1 over the cost of a clip."""
    for row in rows:
        if row.gmacs and row.top1 and row.views:
            yield PaperPoint(row.model, row.gmacs, row.top1, row.views, joined)


def _video_points(rows: Iterable[Row]) -> Iterator[PaperPoint]:
    """Yields top-1 over the cost of all clips of a video."""
    for row in rows:
        gmacs = row.video_gmacs or (row.gmacs or 0) * (row.views or 0)
        if gmacs and row.top1 and row.views:
            yield PaperPoint(row.model, gmacs, row.top1, row.views)


# Figure 2, as far as the text and Table 2 print accuracies: the path, and beside it the worst network of step 1 and
# X3D-S, a contraction of step 7. The path continues from step 7 itself.
_BEST, _WORST = FIGURE_2_STEP_1
_ON_PATH = [row for row in TABLE_2 if row.model in ("X3D-XS", "X3D-M", "X3D-L", "X3D-XL")]
FIGURE_2_POINTS = (
    PaperPoint("X2D", TABLE_1.gmacs, TABLE_1.top1, 10),
    *_clip_points([_BEST, *_ON_PATH], joined=True),
    *_clip_points([_WORST, *(row for row in TABLE_2 if row.model == "X3D-S")]),
)

# Figures 3 and A.4, as far as appendix B and Table 2 print accuracies: X3D-S with 3 and 10 clips, others with 10.
_S_3, _S_10, *_OTHERS = _video_points([*FIGURE_3, *(row for row in TABLE_2 if row.model != "X3D-S")])
FIGURE_3_POINTS = (_S_3._replace(name=""), _S_10._replace(joined=True), *_OTHERS)
