"""From records on disk to `PreferenceBatch`.

`open_records` -> `make_splits` (check, tokenize, drop, split, flip) -> a dataset.  A
sampler (`uniform`, `mixture`) chooses the pairs of each step, and a layout
(`padded_layout`, `packed_layout`) turns them into batches.
"""

from jaxpref.data.batch import PreferenceBatch as PreferenceBatch
from jaxpref.data.builder import DatasetBuilder as DatasetBuilder
from jaxpref.data.dataset import PreferenceDataset as PreferenceDataset
from jaxpref.data.end_of_turn import stop_tokens as stop_tokens
from jaxpref.data.kinds import ANSWERS as ANSWERS
from jaxpref.data.kinds import PAIRS as PAIRS
from jaxpref.data.kinds import Kind as Kind
from jaxpref.data.layouts import Layout as Layout
from jaxpref.data.layouts import PackedLayout as PackedLayout
from jaxpref.data.layouts import PaddedLayout as PaddedLayout
from jaxpref.data.layouts import packed_layout as packed_layout
from jaxpref.data.layouts import padded_layout as padded_layout
from jaxpref.data.options import DataOptions as DataOptions
from jaxpref.data.options import InjectOptions as InjectOptions
from jaxpref.data.options import MixOptions as MixOptions
from jaxpref.data.options import for_model as for_model
from jaxpref.data.prompts import Prompt as Prompt
from jaxpref.data.prompts import given_prompts as given_prompts
from jaxpref.data.prompts import read_prompts as read_prompts
from jaxpref.data.prompts import reworded as reworded
from jaxpref.data.prompts import with_system as with_system
from jaxpref.data.read import Datasets as Datasets
from jaxpref.data.read import read_datasets as read_datasets
from jaxpref.data.record_options import RecordOptions as RecordOptions
from jaxpref.data.record_source import examples_of as examples_of
from jaxpref.data.record_source import first_kind as first_kind
from jaxpref.data.record_source import open_records as open_records
from jaxpref.data.render import TraceMarkers as TraceMarkers
from jaxpref.data.samplers import Order as Order
from jaxpref.data.samplers import first_seen as first_seen
from jaxpref.data.samplers import in_order as in_order
from jaxpref.data.samplers import make_order as make_order
from jaxpref.data.samplers import mixture as mixture
from jaxpref.data.samplers import uniform as uniform
from jaxpref.data.sources import ListSource as ListSource
from jaxpref.data.sources import Source as Source
from jaxpref.data.sources import open_source as open_source
from jaxpref.data.splits import Splits as Splits
from jaxpref.data.splits import make_mixed_splits as make_mixed_splits
from jaxpref.data.splits import make_splits as make_splits
from jaxpref.data.tokenize import encode_prompt as encode_prompt
from jaxpref.data.tokenize import load_tokenizer as load_tokenizer
