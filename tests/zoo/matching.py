"""Networks of the package `kornia`: detection, matching, segmentation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.specimen import BATCH, image, named, public, randn, specimen


class Detector(nn.Module):
    """The neck and the head of RT-DETR on three levels of features."""

    def __init__(self) -> None:
        super().__init__()
        part = "kornia.models.rt_detr.architecture"
        self.encoder = named(f"{part}.hybrid_encoder:HybridEncoder")([4, 6, 8], 16, 16, 0.5)
        self.decoder = named(f"{part}.rtdetr_head:RTDETRHead")(3, 16, 5, [16, 16, 16], 2)

    def forward(self, *levels: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder(self.encoder(list(levels)))


class Segmenter(nn.Module):
    """SAM: encoder of pictures, of prompts, and decoder of masks."""

    def __init__(self) -> None:
        super().__init__()
        part = "kornia.models.sam.architecture"
        self.encoder = named(f"{part}.image_encoder:ImageEncoderViT")(
            img_size=16,
            patch_size=4,
            embed_dim=16,
            depth=2,
            num_heads=2,
            out_chans=16,
            window_size=2,
            global_attn_indexes=(1,),
            use_rel_pos=True,
        )
        self.prompts = named(f"{part}.prompt_encoder:PromptEncoder")(16, (4, 4), (16, 16), 4)
        self.masks = named(f"{part}.mask_decoder:MaskDecoder")(
            transformer_dim=16,
            transformer=named(f"{part}.transformer:TwoWayTransformer")(2, 16, 2, 16),
            iou_head_hidden_dim=16,
        )

    def forward(self, pictures: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.encoder(pictures)
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=points.device)
        sparse, dense = self.prompts((points[:1], labels[:1]), None, None)
        return self.masks(encoded[:1], self.prompts.get_dense_pe(), sparse, dense, True)


def siglip() -> nn.Module:
    config = "kornia.models.siglip2.config"
    layers = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return named("kornia.models.siglip2.model:SigLip2Model")(
        named(f"{config}:SigLip2Config")(
            vision_config=named(f"{config}:SigLip2VisionConfig")(
                image_size=16, patch_size=8, **layers
            ),
            text_config=named(f"{config}:SigLip2TextConfig")(
                vocab_size=40, max_position_embeddings=8, **layers
            ),
        )
    )


def glue() -> nn.Module:
    return named("kornia.feature.lightglue:LightGlue")(
        None,
        input_dim=16,
        descriptor_dim=16,
        n_layers=2,
        num_heads=2,
        depth_confidence=-1,
        width_confidence=-1,
        flash=False,
        filter_threshold=0.0,
    )


def keypoints() -> dict[str, Tensor]:
    return {
        "keypoints": torch.rand(BATCH, 5, 2, dtype=torch.float64) * 16,
        "descriptors": randn(5, 16),
        "image_size": torch.full((BATCH, 2), 16),
    }


MODELS = {
    "match_glue": specimen(
        glue, lambda: ({"image0": keypoints(), "image1": keypoints()},), package="kornia"
    ),
    "detect_transformer": specimen(
        Detector, lambda: (image(16, 4), image(8, 6), image(4, 8)), package="kornia"
    ),
    "detect_faces": public(
        "kornia.models.yunet:YuNet", lambda: (image(64),), "train", pretrained=False, fuses=False
    ),
    "segment_anything": specimen(
        Segmenter, lambda: (image(16), torch.rand(BATCH, 3, 2) * 16), package="kornia"
    ),
    "contrast_sigmoid": specimen(
        siglip,
        lambda: {"pixel_values": image(16), "input_ids": torch.randint(2, 40, (BATCH, 6))},
        package="kornia",
    ),
    "transformer_efficient": public(
        "kornia.models.efficient_vit.backbone:EfficientViTBackbone",
        lambda: (image(32),),
        width_list=[4, 8, 8, 16, 16],
        depth_list=[1, 1, 1, 1, 1],
        dim=8,
        fuses=False,
    ),
    "transformer_mobile": public(
        "kornia.models.vit_mobile:MobileViT", lambda: (image(64),), fuses=False
    ),
}
