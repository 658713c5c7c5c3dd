"""What is one batch?  From text on disk to `PreferenceBatch`.

`open_source` -> `make_plan` (check, tokenise, drop, split, flip) -> `batches`; with
reasoning traces and empty ones side by side `make_mixed_plan` -> `mixed_batches`.
"""

from jaxpref.data.batch import PreferenceBatch as PreferenceBatch
from jaxpref.data.labels import LabelFields as LabelFields
from jaxpref.data.mixture import mixed_batches as mixed_batches
from jaxpref.data.options import DataOptions as DataOptions
from jaxpref.data.options import InjectOptions as InjectOptions
from jaxpref.data.options import MixOptions as MixOptions
from jaxpref.data.options import for_model as for_model
from jaxpref.data.packing import PackedShape as PackedShape
from jaxpref.data.packing import packed_batches as packed_batches
from jaxpref.data.packing import packed_eval_batches as packed_eval_batches
from jaxpref.data.packing import packed_shape as packed_shape
from jaxpref.data.pairs import BatchShape as BatchShape
from jaxpref.data.pairs import Pairs as Pairs
from jaxpref.data.pairs import PairsBuilder as PairsBuilder
from jaxpref.data.pairs import batch_shape as batch_shape
from jaxpref.data.pipeline import batches as batches
from jaxpref.data.pipeline import eval_batches as eval_batches
from jaxpref.data.plan import Plan as Plan
from jaxpref.data.plan import make_mixed_plan as make_mixed_plan
from jaxpref.data.plan import make_plan as make_plan
from jaxpref.data.plan import read_prompts as read_prompts
from jaxpref.data.render import TraceMarkers as TraceMarkers
from jaxpref.data.sources import ListSource as ListSource
from jaxpref.data.sources import Source as Source
from jaxpref.data.sources import open_source as open_source
from jaxpref.data.tokenize import encode_prompt as encode_prompt
from jaxpref.data.tokenize import load_tokenizer as load_tokenizer
