from .errors import InputError as InputError
from .errors import Interrupted as Interrupted
from .losses import DIVERGENCES as DIVERGENCES
from .losses import OBJECTIVES as OBJECTIVES
from .losses import AlignUniformLoss as AlignUniformLoss
from .losses import FDivergence as FDivergence
from .losses import FMICLLoss as FMICLLoss
from .losses import InfoNCELoss as InfoNCELoss
from .losses import SpectralLoss as SpectralLoss
from .losses import tsallis as tsallis
from .losses import uniformity_holds as uniformity_holds
from .text import TextContrastiveModel as TextContrastiveModel
from .text import build_text_encoder as build_text_encoder
from .training import FMICLTrainer as FMICLTrainer
from .training import FMICLTrainingArguments as FMICLTrainingArguments

__version__: str
