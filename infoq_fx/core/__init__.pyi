from .atomic_files import (
    read_json as read_json,
)
from .atomic_files import (
    write_atomically as write_atomically,
)
from .data import (
    CalibrationData as CalibrationData,
)
from .data import (
    read_data as read_data,
)
from .memory import available_memory_bytes as available_memory_bytes
from .readings import (
    Bernoulli as Bernoulli,
)
from .readings import (
    Categorical as Categorical,
)
from .readings import (
    Ignored as Ignored,
)
from .readings import (
    OutputLoss as OutputLoss,
)
from .readings import (
    Quantity as Quantity,
)
from .targets import (
    CONTAINERS as CONTAINERS,
)
from .targets import (
    TARGETS as TARGETS,
)
from .targets import (
    Container as Container,
)
from .targets import (
    Target as Target,
)
from .threads import (
    one_torch_thread as one_torch_thread,
)
from .threads import (
    thread_map as thread_map,
)
from .version import __version__ as __version__
