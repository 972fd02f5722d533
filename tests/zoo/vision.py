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

    return Specimen(build, lambda: (image(size),), fuses=fuses)


MODELS = {
    "bn_inception": cv("bninception"),
    "inception_v3": cv("inceptionv3", 96),
    "inception_v4": cv("inceptionv4", 96),
    "inception_resnet": cv("inceptionresnetv1", 96),
    "squeezenet": cv("squeezenet_v1_1"),
    "resnet": cv("resnet10"),
    "densenet": cv("densenet40_k12_bc_cifar10", 32, fuses=False),
    "shufflenet": cv("shufflenetv2_wd2", fuses=False),
    "efficientnet": cv("efficientnet_b0", fuses=False),
    "fractalnet": cv("fractalnet_cifar10", 32),
    "nasnet": cv("nasnet_4a1056"),
    "darts": cv("darts"),
    "hrnet": cv("hrnet_w18_small_v1"),
    "msdnet": cv("msdnet22_cifar10", 32),
    "dual_path": cv("peleenet"),
    "selective_kernel": cv("sknet50"),
    "octave": cv("octresnet10_ad2"),
    "hardnet": cv("hardnet39ds"),
    "centernet": cv("centernet_resnet18_coco"),
    "openpose": cv("lwopenpose2d_mobilenet_cmupan_coco"),
    "fishnet": cv("fishnet99"),
}
