"""Where a model's arrays lie in a Hugging Face folder: one table a family."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Name:
    """Where one of our arrays lies in a folder.

    `inputs` is how many of its leading axes (behind the layer axis) are the inputs of a
    matrix.  The folder holds `[outputs, inputs]`, each flattened; 0 is stored as it is.
    """

    template: str
    inputs: int = 0

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading layer axis, and the folder one tensor a layer."""
        return "{}" in self.template

    def tensors(self, shape) -> list[str]:
        """The names of the tensors that make up our array of this shape."""
        return [self.template.format(i) for i in range(shape[0] if self.stacked else 1)]

    def stored_shape(self, shape) -> tuple[int, ...]:
        """The shape of each of them."""
        shape, n = tuple(shape[1:] if self.stacked else shape), self.inputs
        return (math.prod(shape[n:]), math.prod(shape[:n])) if n else shape

    def stored_index(self, shape, index) -> tuple[slice, ...]:
        """Where `index` into one layer's array of this shape lies in its tensor."""
        n = self.inputs
        if n == 0:
            return index
        return _flat_slice(shape[n:], index[n:]), _flat_slice(shape[:n], index[:n])


def _flat_slice(shape, index) -> slice:
    # `Specs` shards at most the first of the axes that are flattened together (heads,
    # never the features within one), so that a part is one range of rows or columns.
    bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
    whole = [(0, n, 1) for n in shape]
    assert bounds[1:] == whole[1:], f"{index} of {shape} is not one range"
    row = math.prod(shape[1:])
    return slice(bounds[0][0] * row, bounds[0][1] * row)


LLAMA = {
    "embed": Name("model.embed_tokens.weight"),
    "layers.attention_norm": Name("model.layers.{}.input_layernorm.weight"),
    "layers.query": Name("model.layers.{}.self_attn.q_proj.weight", 1),
    "layers.key": Name("model.layers.{}.self_attn.k_proj.weight", 1),
    "layers.value": Name("model.layers.{}.self_attn.v_proj.weight", 1),
    "layers.output": Name("model.layers.{}.self_attn.o_proj.weight", 2),
    "layers.mlp_norm": Name("model.layers.{}.post_attention_layernorm.weight"),
    "layers.gate": Name("model.layers.{}.mlp.gate_proj.weight", 1),
    "layers.up": Name("model.layers.{}.mlp.up_proj.weight", 1),
    "layers.down": Name("model.layers.{}.mlp.down_proj.weight", 1),
    "norm": Name("model.norm.weight"),
    "head": Name("lm_head.weight", 1),
    "score": Name("score.weight", 1),
}
