"""Figures printed in the paper: accuracies, costs and layer sizes, of X3D and of the methods it is compared with.

Besides, the accuracies that PySlowFast and pytorchvideo publish for the X3D networks that they trained.

GMACs are the paper's "GFLOPs", for one clip or view. Imports no TensorFlow.
"""

from dataclasses import dataclass

from x3d_tf.modeling.architecture import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table of the paper. Figures that the table does not print are None.

    Attributes:
        model: name in the table.
        network: name of the variant if it is one of X3D or EfficientNet3D.
        pretrained: dataset of the pre-training, "-" for none.
        views: number of views per video, None for "N/A".
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent.
        test: mean of top-1 and top-5 on the test videos, in percent.
        map: mean average precision in percent.
        gmacs: multiply-adds for one view, in units of 1e9.
        video_gmacs: multiply-adds for all views of a video, in units of 1e9.
        params: parameters in units of 1e6.
        limit: largest GMACs of the regime.
        printed_differences: differences from the row above, as printed: top-1, top-5, GMACs, parameters.
        dataset: version of AVA.
    """

    model: str
    network: str | None = None
    pretrained: str = "-"
    views: int | None = None
    top1: float | None = None
    top5: float | None = None
    test: float | None = None
    map: float | None = None
    gmacs: float | None = None
    video_gmacs: float | None = None
    params: float | None = None
    limit: float | None = None
    printed_differences: tuple[float, float, float, float] | None = None
    dataset: str = ""


@dataclass(frozen=True)
class Layers:
    """A network of Table 1 or Table 3, as printed.

    Attributes:
        network: name of the variant.
        factors: γτ, γt, γs, γw, γb and γd. The paper's γw of X3D-XL is relative to half the base width.
        conv1: channels of conv1.
        inner: inner channels of res2 to res5.
        outer: outer channels of res2 to res5.
        depths: number of blocks of res2 to res5.
        sides: sides of the input and of the outputs of conv1 and res2 to res5, in pixels.
        gmacs: multiply-adds in units of 1e9.
        params: parameters in units of 1e6.
        top1: top-1 accuracy in percent, 10-Center.
    """

    network: str
    factors: tuple[str, ...]
    conv1: int
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    depths: tuple[int, ...]
    sides: tuple[int, ...]
    gmacs: float
    params: float
    top1: float


@dataclass(frozen=True)
class Ablation:
    """A row of Table A.1. Its body is missing in the text that these figures come from, which states differences only.

    Attributes:
        network: name of the variant.
        change: the component that is changed.
        options: options of the changed network.
        gamma_b: bottleneck factor of the changed network; None keeps that of the variant.
        difference: difference of top-1 from the unchanged network in percent, stated in appendix B.
        recalled: top-1 in percent, GMACs and parameters in units of 1e6, recalled from the public version of the paper
            and not verified.
    """

    network: str
    change: str
    options: ModelOptions
    gamma_b: float | None
    difference: float
    recalled: tuple[float, float, float]


# The best and the worst network of step 1, X2D with γb or γd expanded; section 4.1 states them.
FIGURE_2_STEP_1 = (
    Row(model="γb", views=10, top1=55.0, gmacs=0.0414),
    Row(model="γd", views=10, top1=51.3, gmacs=0.0414),
)

# The points of Figures 3 and A.4 (validation videos) that appendix B states.
X3D_S_3_CLIPS = Row(model="X3D-S", network="x3d_s", views=3, top1=71.4, video_gmacs=5.9)
FIGURE_3 = (
    X3D_S_3_CLIPS,
    Row(model="X3D-S", network="x3d_s", views=10, top1=72.9, video_gmacs=19.6),
    Row(model="CSN-50", views=10, top1=70.8, video_gmacs=119),
    Row(model="CSN-101", views=10, top1=71.8, video_gmacs=159),
)

TABLE_2 = (
    Row(model="X3D-XS", network="x3d_xs", views=10, top1=68.6, top5=87.9, limit=0.6, gmacs=0.60, params=3.76),
    Row(model="X3D-S", network="x3d_s", views=10, top1=72.9, top5=90.5, limit=2, gmacs=1.96, params=3.76),
    Row(model="X3D-M", network="x3d_m", views=10, top1=74.6, top5=91.7, limit=5, gmacs=4.73, params=3.76),
    Row(model="X3D-L", network="x3d_l", views=10, top1=76.8, top5=92.5, limit=20, gmacs=18.37, params=6.08),
    Row(model="X3D-XL", network="x3d_xl", views=10, top1=78.4, top5=93.6, limit=40, gmacs=35.84, params=11.0),
    Row(model="X3D-XXL", network="x3d_xxl", views=10, top1=80.0, top5=94.5, limit=150, gmacs=143.5, params=20.3),
)

_WIDTHS = (24, 48, 96, 192)
# Table 1 with all factors 1; its accuracy is stated in section 4.1.
_SIDES = (112, 56, 28, 14, 7, 4)
TABLE_1 = Layers("x2d", ("-", *"11111"), 24, _WIDTHS, _WIDTHS, (1, 2, 5, 3), _SIDES, 0.02067, 1.63, 47.75)

_SMALL = (24, (54, 108, 216, 432), _WIDTHS, (3, 5, 11, 7))
_LARGE = (32, (72, 162, 306, 630), (32, 72, 136, 280), (5, 10, 25, 15))
_S, _M, _XL = (160, 80, 40, 20, 10, 5), (224, 112, 56, 28, 14, 7), (312, 156, 78, 39, 20, 10)
TABLE_3 = (
    Layers("x3d_s", ("6", "13", "√2", "1", "2.25", "2.2"), *_SMALL, _S, 1.96, 3.76, 72.9),
    Layers("x3d_m", ("5", "16", "2", "1", "2.25", "2.2"), *_SMALL, _M, 4.73, 3.76, 74.6),
    Layers("x3d_xl", ("5", "16", "2√2", "2.9", "2.25", "5"), *_LARGE, _XL, 35.84, 10.99, 78.4),
)

_IMAGENET = "ImageNet"
TABLE_4 = (
    Row(model="I3D", pretrained=_IMAGENET, top1=71.1, top5=90.3, test=80.2, gmacs=108, params=12),
    Row(model="Two-Stream I3D", pretrained=_IMAGENET, top1=75.7, top5=92.0, test=82.8, gmacs=216, params=25),
    Row(model="Two-Stream S3D-G", pretrained=_IMAGENET, top1=77.2, top5=93.0, gmacs=143, params=23.1),
    Row(model="MF-Net", pretrained=_IMAGENET, views=50, top1=72.8, top5=90.4, gmacs=11.1, params=8.0),
    Row(model="TSM R50", pretrained=_IMAGENET, views=10, top1=74.7, gmacs=65, params=24.3),
    Row(model="Nonlocal R50", pretrained=_IMAGENET, views=30, top1=76.5, top5=92.6, gmacs=282, params=35.3),
    Row(model="Nonlocal R101", pretrained=_IMAGENET, views=30, top1=77.7, top5=93.3, test=83.8, gmacs=359, params=54.3),
    Row(model="Two-Stream I3D", top1=71.6, top5=90.0, gmacs=216, params=25.0),
    Row(model="R(2+1)D", views=115, top1=72.0, top5=90.0, gmacs=152, params=63.6),
    Row(model="Two-Stream R(2+1)D", views=115, top1=73.9, top5=90.9, gmacs=304, params=127.2),
    Row(model="Oct-I3D + NL", views=30, top1=75.7, gmacs=28.9, params=33.6),
    Row(model="ip-CSN-152", views=30, top1=77.8, top5=92.8, gmacs=109, params=32.8),
    Row(model="SlowFast 4x16, R50", views=30, top1=75.6, top5=92.1, gmacs=36.1, params=34.4),
    Row(model="SlowFast 8x8, R101", views=30, top1=77.9, top5=93.2, test=84.2, gmacs=106, params=53.7),
    Row(model="SlowFast 8x8, R101+NL", views=30, top1=78.7, top5=93.5, test=84.9, gmacs=116, params=59.9),
    Row(model="SlowFast 16x8, R101+NL", views=30, top1=79.8, top5=93.9, test=85.7, gmacs=234, params=59.9),
    Row(model="X3D-M", network="x3d_m", views=30, top1=76.0, top5=92.3, test=82.9, gmacs=6.2, params=3.8),
    Row(model="X3D-L", network="x3d_l", views=30, top1=77.5, top5=92.9, test=83.8, gmacs=24.8, params=6.1),
    Row(model="X3D-XL", network="x3d_xl", views=30, top1=79.1, top5=93.9, test=85.3, gmacs=48.4, params=11.0),
    Row(model="X3D-XXL", network="x3d_xxl", views=30, top1=80.4, top5=94.6, test=86.7, gmacs=194.1, params=20.3),
)

_K400, _K600 = "Kinetics-400", "Kinetics-600"

# Kinetics-600. The paper prints the parameters of the networks with 400 classes.
TABLE_5 = (
    Row(model="I3D", top1=71.9, top5=90.1, gmacs=108, params=12),
    Row(model="Oct-I3D + NL", pretrained=_IMAGENET, views=30, top1=76.0, gmacs=25.6, params=12),
    Row(model="SlowFast 4x16, R50", views=30, top1=78.8, top5=94.0, gmacs=36.1, params=34.4),
    Row(model="SlowFast 16x8, R101+NL", views=30, top1=81.8, top5=95.1, gmacs=234, params=59.9),
    Row(model="X3D-M", network="x3d_m", views=30, top1=78.8, top5=94.5, gmacs=6.2, params=3.8),
    Row(model="X3D-XL", network="x3d_xl", views=30, top1=81.9, top5=95.5, gmacs=48.4, params=11.0),
)

# Charades. The paper prints the parameters of the networks with 400 classes.
_BOTH = f"{_IMAGENET}+{_K400}"
TABLE_6 = (
    Row(model="Nonlocal", pretrained=_BOTH, views=30, map=37.5, gmacs=544, params=54.3),
    Row(model="STRG + NL", pretrained=_BOTH, views=30, map=39.7, gmacs=630, params=58.3),
    Row(model="Timeception", pretrained=_K400, map=41.1),
    Row(model="LFB + NL", pretrained=_K400, views=30, map=42.5, gmacs=529, params=122),
    Row(model="SlowFast 16x8 + NL", pretrained=_K400, views=30, map=42.5, gmacs=234, params=59.9),
    Row(model="SlowFast 16x8 + NL", pretrained=_K600, views=30, map=45.2, gmacs=234, params=59.9),
    Row(model="X3D-XL", network="x3d_xl", pretrained=_K400, views=30, map=43.4, gmacs=48.4, params=11.0),
    Row(model="X3D-XL", network="x3d_xl", pretrained=_K600, views=30, map=47.1, gmacs=48.4, params=11.0),
)


# On the validation and on the test videos. Some differences do not follow from the figures beside them.
TABLE_7_VALIDATION = (
    Row(
        model="EfficientNet3D-B0", network="efficientnet3d_b0", views=10, top1=66.7, top5=86.6, gmacs=0.74, params=3.30
    ),
    Row(
        model="X3D-XS",
        network="x3d_xs",
        views=10,
        top1=68.6,
        top5=87.9,
        gmacs=0.60,
        params=3.76,
        printed_differences=(1.9, 1.3, -1.4, 0.5),
    ),
    Row(
        model="EfficientNet3D-B3", network="efficientnet3d_b3", views=10, top1=72.4, top5=89.6, gmacs=6.91, params=8.19
    ),
    Row(
        model="X3D-M",
        network="x3d_m",
        views=10,
        top1=74.6,
        top5=91.7,
        gmacs=4.73,
        params=3.76,
        printed_differences=(2.2, 2.1, -2.2, -4.4),
    ),
    Row(
        model="EfficientNet3D-B4",
        network="efficientnet3d_b4",
        views=10,
        top1=74.5,
        top5=90.6,
        gmacs=23.80,
        params=12.16,
    ),
    Row(
        model="X3D-L",
        network="x3d_l",
        views=10,
        top1=76.8,
        top5=92.5,
        gmacs=18.37,
        params=6.08,
        printed_differences=(2.3, 1.9, -5.4, -6.1),
    ),
)
TABLE_7_TEST = (
    Row(
        model="EfficientNet3D-B0", network="efficientnet3d_b0", views=10, top1=64.8, top5=85.4, gmacs=0.74, params=3.30
    ),
    Row(
        model="X3D-XS",
        network="x3d_xs",
        views=10,
        top1=66.6,
        top5=86.8,
        gmacs=0.60,
        params=3.76,
        printed_differences=(1.8, 1.4, -1.4, 0.5),
    ),
    Row(
        model="EfficientNet3D-B3", network="efficientnet3d_b3", views=10, top1=69.9, top5=88.1, gmacs=6.91, params=8.19
    ),
    Row(
        model="X3D-M",
        network="x3d_m",
        views=10,
        top1=73.0,
        top5=90.8,
        gmacs=4.73,
        params=3.76,
        printed_differences=(2.1, 2.7, -2.2, -4.4),
    ),
    Row(
        model="EfficientNet3D-B4",
        network="efficientnet3d_b4",
        views=10,
        top1=71.8,
        top5=88.9,
        gmacs=23.80,
        params=12.16,
    ),
    Row(
        model="X3D-L",
        network="x3d_l",
        views=10,
        top1=74.6,
        top5=91.4,
        gmacs=18.37,
        params=6.08,
        printed_differences=(2.8, 2.5, -5.4, -6.1),
    ),
)

TABLE_8 = (
    Row(model="LFB, R50+NL", dataset="2.1", pretrained=_K400, map=25.8, gmacs=529, params=73.6),
    Row(model="LFB, R101+NL", dataset="2.1", pretrained=_K400, map=26.8, gmacs=677, params=122),
    Row(model="X3D-XL", network="x3d_xl", dataset="2.1", pretrained=_K400, map=26.1, gmacs=48.4, params=11.0),
    Row(model="SlowFast 4x16, R50", dataset="2.2", pretrained=_K600, map=24.7, gmacs=52.5, params=33.7),
    Row(model="SlowFast 8x8, R101+NL", dataset="2.2", pretrained=_K600, map=27.4, gmacs=146, params=59.2),
    Row(model="X3D-M", network="x3d_m", dataset="2.2", pretrained=_K600, map=23.2, gmacs=6.2, params=3.1),
    Row(model="X3D-XL", network="x3d_xl", dataset="2.2", pretrained=_K600, map=27.4, gmacs=48.4, params=11.0),
)

# "Dense" replaces the channel-wise 3x3x3 convolution by a dense 3x1x1 and a dense 1x3x3, which gives the public costs.
_DENSE, _RELU, _NO_SE = ModelOptions(separable=False), ModelOptions(swish=False), ModelOptions(se="none")
TABLE_A1 = (
    Ablation("x3d_s", "dense, equal GMACs", _DENSE, 0.6, -4.0, (68.9, 1.95, 3.16)),
    Ablation("x3d_s", "dense", _DENSE, None, 0.3, (73.2, 17.6, 22.1)),
    Ablation("x3d_s", "ReLU for swish", _RELU, None, -0.9, (72.0, 1.96, 3.76)),
    Ablation("x3d_s", "no SE", _NO_SE, None, -1.6, (71.3, 1.96, 3.60)),
    Ablation("x3d_xl", "dense, equal GMACs", _DENSE, 0.56, -2.4, (76.0, 34.8, 9.73)),
    Ablation("x3d_xl", "dense", _DENSE, None, 0.8, (79.2, 365.4, 95.1)),
    Ablation("x3d_xl", "ReLU for swish", _RELU, None, -0.4, (78.0, 35.84, 11.0)),
    Ablation("x3d_xl", "no SE", _NO_SE, None, -1.3, (77.1, 35.84, 10.4)),
)

# Not the paper's: accuracies on the validation videos of Kinetics-400 of the networks that PySlowFast trained, with its
# own recipe (its MODEL_ZOO.md).
PYSLOWFAST = (
    Row(model="X3D-XS", network="x3d_xs", views=10, top1=68.7),
    Row(model="X3D-XS", network="x3d_xs", views=30, top1=69.5),
    Row(model="X3D-S", network="x3d_s", views=10, top1=73.1),
    Row(model="X3D-S", network="x3d_s", views=30, top1=73.5),
    Row(model="X3D-M", network="x3d_m", views=10, top1=75.1),
    Row(model="X3D-M", network="x3d_m", views=30, top1=76.2),
    Row(model="X3D-L", network="x3d_l", views=10, top1=76.9),
    Row(model="X3D-L", network="x3d_l", views=30, top1=77.5),
)

# The same for pytorchvideo (pytorchvideo/models/hub/x3d.py).
PYTORCHVIDEO = (
    Row(model="X3D-XS", network="x3d_xs", views=30, top1=69.12),
    Row(model="X3D-S", network="x3d_s", views=30, top1=73.33),
    Row(model="X3D-M", network="x3d_m", views=30, top1=75.94),
    Row(model="X3D-L", network="x3d_l", views=30, top1=77.44),
)
