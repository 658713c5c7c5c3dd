"""Random access to records: files, folders, URLs, and datasets of other packages."""

from jaxpref.data.sources.divisible import Divisible as Divisible
from jaxpref.data.sources.open import open_source as open_source
from jaxpref.data.sources.source import Joined as Joined
from jaxpref.data.sources.source import ListSource as ListSource
from jaxpref.data.sources.source import Source as Source
from jaxpref.data.sources.source import divisible as divisible
