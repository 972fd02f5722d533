"""Blocks and heads of networks for images, as torchvision, pytorchcv, timm and YOLO write them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.nn import Split, Unite
from depth.model import Deep, between, randn


class BasicConv2d(nn.Module):
    """torchvision: convolution, BatchNorm, and a functional ReLU in place."""

    def __init__(self, in_channels: int, out_channels: int, **settings: int | tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **settings)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class InceptionA(nn.Module):
    """torchvision's first block: three 1x1 convolutions on one tensor, one behind a pooling."""

    def __init__(self, in_channels: int, pool_features: int, conv_block=None) -> None:
        super().__init__()
        if conv_block is None:
            conv_block = BasicConv2d
        self.branch1x1 = conv_block(in_channels, 4, kernel_size=1)
        self.branch5x5_1 = conv_block(in_channels, 3, kernel_size=1)
        self.branch5x5_2 = conv_block(3, 4, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = conv_block(in_channels, 4, kernel_size=1)
        self.branch3x3dbl_2 = conv_block(4, 5, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = conv_block(5, 5, kernel_size=3, padding=1)
        self.branch_pool = conv_block(in_channels, pool_features, kernel_size=1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_1(x)
        branch3x3dbl = self.branch3x3dbl_2(branch3x3dbl)
        branch3x3dbl = self.branch3x3dbl_3(branch3x3dbl)
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        return [branch1x1, branch5x5, branch3x3dbl, branch_pool]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


class InceptionE(nn.Module):
    """torchvision's last block: branches that fork once more, into 1x3 and 3x1."""

    def __init__(self, in_channels: int, conv_block=BasicConv2d) -> None:
        super().__init__()
        self.branch1x1 = conv_block(in_channels, 3, kernel_size=1)
        self.branch3x3_1 = conv_block(in_channels, 4, kernel_size=1)
        self.branch3x3_2a = conv_block(4, 3, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = conv_block(4, 3, kernel_size=(3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = conv_block(in_channels, 5, kernel_size=1)
        self.branch3x3dbl_2 = conv_block(5, 4, kernel_size=3, padding=1)
        self.branch3x3dbl_3a = conv_block(4, 3, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = conv_block(4, 3, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = conv_block(in_channels, 2, kernel_size=1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch1x1 = self.branch1x1(x)
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = [self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)]
        branch3x3 = torch.cat(branch3x3, 1)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = [self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl)]
        branch3x3dbl = torch.cat(branch3x3dbl, 1)
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        return [branch1x1, branch3x3, branch3x3dbl, branch_pool]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


class InceptionV3(nn.Module):
    """torchvision's network, cut down to a stem, two blocks and the classifier."""

    def __init__(self, aux_logits: bool = False, transform_input: bool = False) -> None:
        super().__init__()
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.Conv2d_1a_3x3 = BasicConv2d(3, 5, kernel_size=3, stride=2)
        self.Mixed_5b = InceptionA(5, pool_features=2)
        self.Mixed_7b = InceptionE(15)
        self.AuxLogits: nn.Module | None = None
        if aux_logits:
            self.AuxLogits = nn.Linear(15, 4)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.5)
        self.fc = nn.Linear(17, 4)

    def _transform_input(self, x: Tensor) -> Tensor:
        if self.transform_input:
            x = torch.cat([x[:, i : i + 1] * 0.5 for i in range(3)], 1)
        return x

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.Conv2d_1a_3x3(x)
        x = self.Mixed_5b(x)
        aux: Tensor | None = None
        if self.AuxLogits is not None and self.training:
            aux = self.AuxLogits(x.mean((2, 3)))
        x = self.Mixed_7b(x)
        x = self.avgpool(x)
        x = self.dropout(x)
        x = torch.flatten(x, 1)
        return self.fc(x), aux

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        x = self._transform_input(x)
        x, aux = self._forward(x)
        if self.training and self.aux_logits:
            return x, aux
        return x


class GoogLeNetBlock(nn.Module):
    """torchvision: branches that are nn.Sequential, of different widths."""

    def __init__(self, inputs: int, ch1: int, red3: int, ch3: int, red5: int, ch5: int, pool: int):
        super().__init__()
        self.branch1 = BasicConv2d(inputs, ch1, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(inputs, red3, kernel_size=1),
            BasicConv2d(red3, ch3, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(inputs, red5, kernel_size=1),
            BasicConv2d(red5, ch5, kernel_size=3, padding=1),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            BasicConv2d(inputs, pool, kernel_size=1),
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch1 = self.branch1(x)
        branch2 = self.branch2(x)
        branch3 = self.branch3(x)
        branch4 = self.branch4(x)
        return [branch1, branch2, branch3, branch4]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


def googlenet() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv1=BasicConv2d(3, 4, kernel_size=3, padding=1),
            inception3a=GoogLeNetBlock(4, 3, 3, 4, 2, 3, 2),
            inception3b=GoogLeNetBlock(12, 4, 4, 5, 3, 2, 2),
            avgpool=nn.AdaptiveAvgPool2d((1, 1)),
            flatten=nn.Flatten(),
            fc=nn.Linear(13, 4),
        )
    )


class ConvBlock(nn.Module):
    """pytorchcv: flags say which of padding, BatchNorm and activation there are."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: int | tuple[int, int, int, int] = 0,
        bias: bool = False,
        use_bn: bool = True,
        bn_eps: float = 1e-5,
        activation: Callable[[], nn.Module] | None = lambda: nn.ReLU(inplace=True),
    ) -> None:
        super().__init__()
        self.activate = activation is not None
        self.use_bn = use_bn
        self.use_pad = isinstance(padding, tuple)
        if self.use_pad:
            self.pad = nn.ZeroPad2d(padding)
            padding = 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=bias)
        if self.use_bn:
            self.bn = nn.BatchNorm2d(out_channels, eps=bn_eps)
        if self.activate:
            self.activ = activation()

    def forward(self, x: Tensor) -> Tensor:
        if self.use_pad:
            x = self.pad(x)
        x = self.conv(x)
        if self.use_bn:
            x = self.bn(x)
        if self.activate:
            x = self.activ(x)
        return x


class Concurrent(nn.Sequential):
    """pytorchcv: a Sequential whose modules all read the input."""

    def __init__(self, axis: int = 1, stack: bool = False, merge_type: str | None = None) -> None:
        super().__init__()
        self.axis = axis
        self.merge_type = merge_type if merge_type is not None else ("stack" if stack else "cat")

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for module in self._modules.values():
            out.append(module(x))
        if self.merge_type == "stack":
            out = torch.stack(tuple(out), dim=self.axis)
        elif self.merge_type == "cat":
            out = torch.cat(tuple(out), dim=self.axis)
        elif self.merge_type == "sum":
            out = torch.stack(tuple(out), dim=self.axis).sum(self.axis)
        else:
            raise NotImplementedError
        return out


class ConcurrentUnit(nn.Module):
    """pytorchcv: branches of one and of two blocks, the second ones of equal widths."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branches = Concurrent()
        self.branches.add_module("branch1", ConvBlock(in_channels, 6, 1))
        for number in (2, 3):
            sequence = nn.Sequential()
            sequence.add_module("conv1", ConvBlock(in_channels, 4, 1))
            sequence.add_module("conv2", ConvBlock(4, 5, 3, padding=1))
            self.branches.add_module(f"branch{number}", sequence)
        pooled = nn.Sequential()
        pooled.add_module("pool", nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False))
        pooled.add_module("conv", ConvBlock(in_channels, 3, 1))
        self.branches.add_module("branch4", pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.branches(x)


class BatchNormAct2d(nn.BatchNorm2d):
    """timm: a BatchNorm with a forward of its own, which has the activation in it."""

    def __init__(self, num_features: int, eps: float = 1e-3) -> None:
        super().__init__(num_features, eps=eps)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        average_factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            by_batch,
            average_factor,
            self.eps,
        )
        x = self.drop(x)
        return self.act(x)


class ConvNormAct(nn.Module):
    """timm: convolution and BatchNorm with activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = BatchNormAct2d(out_channels)
        self.aa = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        if self.aa is not None:
            x = self.aa(x)
        return x


class InceptionV4A(nn.Module):
    """timm: the second blocks of two branches have equal widths."""

    def __init__(self, inputs: int = 6) -> None:
        super().__init__()
        self.branch0 = ConvNormAct(inputs, 6, 1)
        self.branch1 = nn.Sequential(ConvNormAct(inputs, 4, 1), ConvNormAct(4, 6, 3, padding=1))
        self.branch2 = nn.Sequential(
            ConvNormAct(inputs, 4, 1),
            ConvNormAct(4, 6, 3, padding=1),
            ConvNormAct(6, 6, 3, padding=1),
        )
        self.branch3 = nn.Sequential(
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            ConvNormAct(inputs, 6, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x0 = self.branch0(x)
        x1 = self.branch1(x)
        x2 = self.branch2(x)
        x3 = self.branch3(x)
        return torch.cat((x0, x1, x2, x3), 1)


class YoloConv(nn.Module):
    """YOLO: all of them share one SiLU, which is an attribute of the class."""

    default_act = nn.SiLU()

    def __init__(self, c1: int, c2: int, k: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, padding=k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = (
            self.default_act
            if act is True
            else act
            if isinstance(act, nn.Module)
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """YOLO: two convolutions, and the input if it has as many channels."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1 = YoloConv(c1, c2, 1)
        self.cv2 = YoloConv(c2, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3(nn.Module):
    """YOLO's cross-stage block: one of two 1x1 convolutions goes around the bottlenecks."""

    def __init__(self, c1: int = 6, c2: int = 8, n: int = 1) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = YoloConv(c1, hidden)
        self.cv2 = YoloConv(c1, hidden)
        self.cv3 = YoloConv(2 * hidden, c2)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


def pose_branch(inputs: int, kernel: int, outputs: int) -> nn.Sequential:
    """A branch of OpenPose: hidden convolutions with ReLU in place, and an output of its own."""
    hidden = 6
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, kernel, padding=kernel // 2),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, 1),
    )


class OpenPose(nn.Module):
    """Part affinities and heat maps: two branches of equal widths in every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.model0 = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True))
        self.model1_1 = pose_branch(5, 3, 4)
        self.model1_2 = pose_branch(5, 3, 3)
        self.model2_1 = pose_branch(12, 5, 4)
        self.model2_2 = pose_branch(12, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out1 = self.model0(x)
        out1_1 = self.model1_1(out1)
        out1_2 = self.model1_2(out1)
        out2 = torch.cat([out1_1, out1_2, out1], 1)
        out2_1 = self.model2_1(out2)
        out2_2 = self.model2_2(out2)
        return out2_1, out2_2


class TwoBranches(nn.Module):
    """In the manner of VGG: two branches with poolings, whose features one classifier reads."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.shape_branch = self._make_layers([5, "M", 6, "M"])
        self.texture_branch = self._make_layers([5, "M", 6, "M"])
        self.classifier = nn.Linear(2 * 6 * 2 * 2, num_classes)

    @staticmethod
    def _make_layers(config: list[int | str]) -> nn.Sequential:
        layers: list[nn.Module] = []
        channels = 4
        for width in config:
            if width == "M":
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers += [nn.ReLU(inplace=True)]
                channels = width
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shape = self.shape_branch(x)
        shape = torch.flatten(shape, 1)
        texture = self.texture_branch(x)
        texture = torch.flatten(texture, 1)
        return self.classifier(torch.cat([shape, texture], dim=1))


class CenterNet(nn.Module):
    """Heads that are attributes by the names in a dict."""

    def __init__(self, heads: dict[str, int] | None = None, head_conv: int = 6) -> None:
        super().__init__()
        self.heads = heads or {"hm": 5, "wh": 2, "reg": 2}
        self.base = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True))
        for head, classes in self.heads.items():
            fc = nn.Sequential(
                nn.Conv2d(5, head_conv, 3, padding=1, bias=True),
                nn.ReLU(inplace=True),
                nn.Conv2d(head_conv, classes, 1, bias=True),
            )
            self.__setattr__(head, fc)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        x = self.base(x)
        ret = {}
        for head in self.heads:
            ret[head] = self.__getattr__(head)(x)
        return [ret]


class Conv2dNormActivation(nn.Sequential):
    """torchvision: a Sequential of a convolution, a norm and an activation."""

    def __init__(self, inputs: int, outputs: int, norm_layer=None, bias: bool | None = None):
        bias = norm_layer is None if bias is None else bias
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)]
        if norm_layer is not None:
            layers.append(norm_layer(outputs))
        layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)
        self.out_channels = outputs


class RetinaNetClassificationHead(nn.Module):
    """torchvision: a tower of convolutions and the scores, on every level of a pyramid."""

    def __init__(self, channels: int, anchors: int, classes: int, norm_layer=None) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(Conv2dNormActivation(channels, channels, norm_layer=norm_layer) for _ in range(2))
        )
        self.cls_logits = nn.Conv2d(channels, anchors * classes, kernel_size=3, padding=1)
        self.num_classes = classes
        self.num_anchors = anchors

    def forward(self, x: list[Tensor]) -> Tensor:
        all_cls_logits = []
        for features in x:
            cls_logits = self.conv(features)
            cls_logits = self.cls_logits(cls_logits)
            n, _, height, width = cls_logits.shape
            cls_logits = cls_logits.view(n, -1, self.num_classes, height, width)
            cls_logits = cls_logits.permute(0, 3, 4, 1, 2)
            cls_logits = cls_logits.reshape(n, -1, self.num_classes)
            all_cls_logits.append(cls_logits)
        return torch.cat(all_cls_logits, dim=1)


class RetinaNetRegressionHead(nn.Module):
    """torchvision: the same for the boxes."""

    def __init__(self, channels: int, anchors: int, norm_layer=None) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(Conv2dNormActivation(channels, channels, norm_layer=norm_layer) for _ in range(2))
        )
        self.bbox_reg = nn.Conv2d(channels, anchors * 4, kernel_size=3, padding=1)

    def forward(self, x: list[Tensor]) -> Tensor:
        all_bbox_regression = []
        for features in x:
            bbox_regression = self.conv(features)
            bbox_regression = self.bbox_reg(bbox_regression)
            n, _, height, width = bbox_regression.shape
            bbox_regression = bbox_regression.view(n, -1, 4, height, width)
            bbox_regression = bbox_regression.permute(0, 3, 4, 1, 2)
            bbox_regression = bbox_regression.reshape(n, -1, 4)
            all_bbox_regression.append(bbox_regression)
        return torch.cat(all_bbox_regression, dim=1)


class RetinaNetHead(nn.Module):
    """torchvision: the towers of classes and of boxes go over the levels one after the other."""

    def __init__(self, channels: int = 4, anchors: int = 2, classes: int = 3, norm_layer=None):
        super().__init__()
        self.classification_head = RetinaNetClassificationHead(
            channels, anchors, classes, norm_layer
        )
        self.regression_head = RetinaNetRegressionHead(channels, anchors, norm_layer)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {
            "cls_logits": self.classification_head(x),
            "bbox_regression": self.regression_head(x),
        }


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


class FCOSHead(nn.Module):
    """torchvision: towers with GroupNorm; the boxes' tower has two outputs."""

    def __init__(self, channels: int = 4, classes: int = 3, num_convs: int = 2) -> None:
        super().__init__()
        towers = []
        for _ in range(2):
            layers: list[nn.Module] = []
            for _ in range(num_convs):
                layers.append(nn.Conv2d(channels, channels, kernel_size=3, padding=1))
                layers.append(group_norm(channels))
                layers.append(nn.ReLU())
            towers.append(nn.Sequential(*layers))
        self.cls_conv, self.reg_conv = towers
        self.cls_logits = nn.Conv2d(channels, classes, kernel_size=3, padding=1)
        self.bbox_reg = nn.Conv2d(channels, 4, kernel_size=3, padding=1)
        self.bbox_ctrness = nn.Conv2d(channels, 1, kernel_size=3, padding=1)

    def classify(self, x: list[Tensor]) -> Tensor:
        scores = [self.cls_logits(self.cls_conv(features)) for features in x]
        return torch.cat([score.flatten(2) for score in scores], dim=2)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        all_bbox, all_ctrness = [], []
        for features in x:
            bbox_feature = self.reg_conv(features)
            bbox_regression = F.relu(self.bbox_reg(bbox_feature))
            bbox_ctrness = self.bbox_ctrness(bbox_feature)
            n, _, height, width = bbox_regression.shape
            bbox_regression = bbox_regression.view(n, -1, 4, height, width)
            all_bbox.append(bbox_regression.permute(0, 3, 4, 1, 2).reshape(n, -1, 4))
            bbox_ctrness = bbox_ctrness.view(n, -1, 1, height, width)
            all_ctrness.append(bbox_ctrness.permute(0, 3, 4, 1, 2).reshape(n, -1, 1))
        return {
            "cls_logits": self.classify(x),
            "bbox_regression": torch.cat(all_bbox, dim=1),
            "bbox_ctrness": torch.cat(all_ctrness, dim=1),
        }


class BaseConv(nn.Module):
    """YOLOX: convolution, BatchNorm, SiLU in place."""

    def __init__(self, inputs: int, outputs: int, ksize: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, ksize, padding=(ksize - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class YOLOXHead(nn.Module):
    """YOLOX: a stem for each level, and on it a tower for the classes and one for the boxes."""

    def __init__(self, num_classes: int = 3, strides: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = strides
        self.stems, self.cls_convs, self.reg_convs = (nn.ModuleList() for _ in range(3))
        self.cls_preds, self.reg_preds, self.obj_preds = (nn.ModuleList() for _ in range(3))
        for level in range(len(strides)):
            self.stems.append(BaseConv(3 + level, 4, 1))
            for convs in (self.cls_convs, self.reg_convs):
                convs.append(nn.Sequential(BaseConv(4, 4, 3), BaseConv(4, 4, 3)))
            self.cls_preds.append(nn.Conv2d(4, num_classes, 1))
            self.reg_preds.append(nn.Conv2d(4, 4, 1))
            self.obj_preds.append(nn.Conv2d(4, 1, 1))

    def forward(self, xin: list[Tensor]) -> Tensor | list[Tensor]:
        outputs = []
        for k, (cls_conv, reg_conv, _stride, x) in enumerate(
            zip(self.cls_convs, self.reg_convs, self.strides, xin)  # noqa: B905
        ):
            x = self.stems[k](x)
            cls_x = x
            reg_x = x
            cls_feat = cls_conv(cls_x)
            cls_output = self.cls_preds[k](cls_feat)
            reg_feat = reg_conv(reg_x)
            reg_output = self.reg_preds[k](reg_feat)
            obj_output = self.obj_preds[k](reg_feat)
            if self.training:
                output = torch.cat([reg_output, obj_output, cls_output], 1)
            else:
                output = torch.cat([reg_output, obj_output.sigmoid(), cls_output.sigmoid()], 1)
            outputs.append(output)
        if self.training:
            return outputs
        self.hw = [x.shape[-2:] for x in outputs]
        return torch.cat([x.flatten(start_dim=2) for x in outputs], dim=2).permute(0, 2, 1)


def by_hand() -> nn.Module:
    """The encoder of the README's "Branches by hand": two heads, joined, and split once more."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5),
        nn.ReLU(),
        nn.MaxPool2d(3),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(3),
        Split(nn.Conv2d(6, 12, 2), parts=2),
        Unite(),
        Split(nn.Flatten(), parts=2),
    )


def images(size: int = 8, channels: int = 3) -> Callable[[int], tuple[Tensor]]:
    return lambda batch: (randn(batch, channels, size, size),)


def pyramid(*channels: int) -> Callable[[int], tuple[list[Tensor]]]:
    """Levels of 8x8, 4x4, 2x2."""
    return lambda batch: (
        [randn(batch, width, 8 >> level, 8 >> level) for level, width in enumerate(channels)],
    )


MODELS = {
    # Stem, A: 1 + 2 + 3 + 1 convolutions, E: 1 + 3 + 4 + 1, classifier. In each block the three
    # 1x1 that read its input become one, and so do their norms and ReLUs. The other convolutions
    # differ in kernel or width.
    "inception_v3": Deep(
        InceptionV3,
        images(9),
        {
            "convolutions": (17, 13),
            "matmuls": (1, 1),
            "norms": (17, 13),
            "activations": (17, 13),
            "joins": (4, between(2, 4)),
            "dropouts": (0, 0),
        },
        {"dropouts": (1, 1)},
    ),
    # The stem, two blocks of six convolutions, the classifier; three 1x1 in each are one.
    "googlenet": Deep(
        googlenet,
        images(),
        {"products": (14, 10), "norms": (13, 9), "activations": (13, 9), "joins": (2, 2)},
    ),
    # The three 1x1 on the input are one, the two 3x3 of equal widths are one grouped convolution,
    # and the one behind the pooling is alone.
    "concurrent": Deep(
        lambda: ConcurrentUnit(6),
        images(8, 6),
        {"products": (6, 3), "norms": (6, 3), "activations": (6, 3), "joins": (1, 1)},
    ),
    # Of 1 + 2 + 3 + 1: the three 1x1 are one. The normalizations are of a class of its own, which
    # counts its batches in place, so that nothing behind them goes together.
    "inception_v4": Deep(
        InceptionV4A,
        images(8, 6),
        {"products": (7, 5), "norms": (7, 7), "activations": (7, 7), "joins": (1, 1)},
    ),
    # cv1 and cv2 are one; the bottleneck's two and cv3 stay.
    "cross_stage": Deep(
        C3,
        images(8, 6),
        {"products": (5, 4), "norms": (5, 4), "activations": (5, 4), "joins": (1, 1)},
    ),
    # In each of two stages the three hidden layers of two branches are one each. The outputs have
    # different widths.
    "openpose": Deep(
        OpenPose,
        images(),
        {"products": (1 + 16, 1 + 2 * 5), "activations": (1 + 12, 1 + 6), "joins": (1, 1)},
    ),
    # Both layers of the branches are one, with norm, ReLU and pooling. Flattened parts that are
    # joined again are the whole, flattened.
    "two_branches": Deep(
        TwoBranches,
        images(16),
        {
            "products": (1 + 4 + 1, 1 + 2 + 1),
            "norms": (4, 2),
            "activations": (1 + 4, 1 + 2),
            "pools": (1 + 4, 1 + 2),
            "joins": (1, between(0, 1)),
        },
    ),
    # The hidden layers are one. Two of the three outputs have equal widths, and may be one.
    "centernet": Deep(
        CenterNet,
        images(),
        {"products": (1 + 6, between(1 + 3, 1 + 4)), "activations": (1 + 3, 1 + 1)},
    ),
    # On each of three levels two hidden layers of two towers, of which the outputs differ.
    "retinanet": Deep(
        RetinaNetHead,
        pyramid(4, 4, 4),
        {"products": (18, 12), "activations": (12, 6), "joins": (2, 2)},
    ),
    # The same with GroupNorm, whose groups lie within the channels of one tower.
    "retinanet_norm": Deep(
        lambda: RetinaNetHead(norm_layer=group_norm),
        pyramid(4, 4),
        {"products": (12, 8), "norms": (8, 4), "activations": (8, 4)},
    ),
    # On each of two levels two hidden layers of two towers, the scores, and the boxes with the
    # centerness, which are one. A third activation is the boxes' own.
    "fcos": Deep(
        FCOSHead,
        pyramid(4, 4),
        {"products": (14, 8), "norms": (8, 4), "activations": (10, 6), "joins": (3, 3)},
    ),
    # On each of two levels a stem, two hidden layers of two towers, the scores, and the boxes with
    # the objectness, which are one. In evaluation two sigmoids more a level. The forward keeps the
    # sizes of its levels on the module.
    "yolox": Deep(
        YOLOXHead,
        pyramid(3, 4),
        {
            "products": (16, 10),
            "norms": (10, 6),
            "activations": (14, 10),
            "joins": (3, between(1, 3)),
        },
        {"activations": (10, 6), "joins": (2, 2)},
    ),
    "by_hand": Deep(
        by_hand,
        images(28, 1),
        {"products": (3, 3), "activations": (2, 2), "joins": (1, 0), "splits": (2, 1)},
    ),
}
