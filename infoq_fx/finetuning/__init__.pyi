from .finetuning import finetune as finetune
from .retraining import (
    TrainableModule as TrainableModule,
    to_quantized as to_quantized,
    to_trainable as to_trainable,
)
from .trainable import (
    LearnedStepQuantizer as LearnedStepQuantizer,
    float_copy as float_copy,
    trainable_copy as trainable_copy,
)
