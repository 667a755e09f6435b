"""The passes that bring the layers of a captured graph into the forms that can be quantized."""

from __future__ import annotations

from infoq_fx.graph.layer_forms.embedding_bags import write_embedding_bags
from infoq_fx.graph.layer_forms.products import write_products_as_layers
from infoq_fx.graph.layer_forms.recurrent import write_recurrent_layers
from infoq_fx.graph.passes.add_head_dimension import add_head_dimension
from infoq_fx.graph.passes.fold_batch_norm import fold_batch_norm
from infoq_fx.graph.passes.fold_constants import drop_unread_tensors, fold_constants
from infoq_fx.graph.passes.pass_manager import GraphPass

__all__ = ["LAYER_FORMS", "NORMAL_FORM"]

LAYER_FORMS: tuple[GraphPass, ...] = (write_recurrent_layers, write_embedding_bags, write_products_as_layers)
"""Those that give layers of many names one form."""

NORMAL_FORM: tuple[GraphPass, ...] = (
    *LAYER_FORMS,
    fold_constants,
    fold_batch_norm,
    add_head_dimension,
    drop_unread_tensors,
)
"""All, in the order in which they run."""
