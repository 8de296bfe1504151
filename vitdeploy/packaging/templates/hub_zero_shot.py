"""Image classifiers whose head is one of texts' embeddings, for transformers 4.57 and later.

transformers computes such a classifier from both towers of CLIP or SigLIP; here the texts' vectors, times the
logits' factor, are the head already, so that the text tower and its tokenizer are not needed. Loaded by
AutoModelForImageClassification.from_pretrained(..., trust_remote_code=True).
"""

from typing import Any

from torch import Tensor, nn
from transformers import CLIPPreTrainedModel, CLIPVisionConfig, SiglipPreTrainedModel, SiglipVisionConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip

# What holds a tower's layers; before transformers 5.23 a class below the model.
_CLIPTower = getattr(modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel)
_SiglipTower = getattr(modeling_siglip, "SiglipVisionTransformer", modeling_siglip.SiglipVisionModel)


def _classified(classifier: nn.Module, embedding: Tensor) -> ImageClassifierOutput:
    """The logits (N, labels) of embeddings (N, E): cosines, scaled."""
    unit = embedding / embedding.norm(dim=-1, keepdim=True)
    return ImageClassifierOutput(logits=classifier(unit))


class CLIPZeroShotForImageClassification(CLIPPreTrainedModel):
    config_class = CLIPVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = _CLIPTower(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.classifier = nn.Linear(config.projection_dim, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **unused: Any) -> ImageClassifierOutput:
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        return _classified(self.classifier, self.visual_projection(pooled))


class SiglipZeroShotForImageClassification(SiglipPreTrainedModel):
    config_class = SiglipVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = _SiglipTower(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **unused: Any) -> ImageClassifierOutput:
        return _classified(self.classifier, self.vision_model(pixel_values=pixel_values).pooler_output)
