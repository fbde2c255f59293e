"""A small real vision-language model: it reads handwritten digits off a picture of 16 x 16 of them.

`load_model()` and `load_processor()` give stock LLaVA classes with trained weights; `held_out_questions()` gives
pictures, questions and answers to measure them on. How the model was made stands in the model card, `README.md` in
`model_dir()`; `tools/digits` of the repository makes it.
"""

from .loading import held_out_questions, load_model, load_processor, model_dir
from .questions import Question

__all__ = ["Question", "held_out_questions", "load_model", "load_processor", "model_dir"]
