from .finetuning import finetune as finetune
from .retraining import (
    TrainableModule as TrainableModule,
)
from .retraining import (
    to_quantized as to_quantized,
)
from .retraining import (
    to_trainable as to_trainable,
)
from .trainable import (
    LearnedStepQuantizer as LearnedStepQuantizer,
)
from .trainable import (
    float_copy as float_copy,
)
from .trainable import (
    trainable_copy as trainable_copy,
)
