"""Networks of pytorchcv."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.specimen import Specimen, image


def cv(name: str, size: int = 64, *, fuses: bool = True, **settings: Any) -> Specimen:
    """A network on square images; its last pooling is made to take images of any size."""

    def build() -> nn.Module:
        from pytorchcv.model_provider import get_model

        model = get_model(name, **settings)
        for module in list(model.modules()):
            if isinstance(getattr(module, "final_pool", None), nn.AvgPool2d):
                module.final_pool = nn.AdaptiveAvgPool2d(1)
        return model

    return Specimen(build, lambda: (image(size),), fuses=fuses, package="pytorchcv")


MODELS = {
    "bn_inception": cv("bninception"),
    "inception_v3": cv("inceptionv3", 96),
    "squeezenet": cv("squeezenet_v1_1", fuses=False),
    "resnet": cv("resnet10", fuses=False),
    "densenet": cv("densenet40_k12_bc_cifar10", 32, fuses=False),
    "shufflenet": cv("shufflenetv2_wd2", fuses=False),
    "hrnet": cv("hrnet_w18_small_v1"),
    "msdnet": cv("msdnet22_cifar10", 32),
    "peleenet": cv("peleenet"),
    "octave": cv("octresnet10_ad2", fuses=False),
    "centernet": cv("centernet_resnet18_coco"),
    "openpose": cv("lwopenpose2d_mobilenet_cmupan_coco"),
}
