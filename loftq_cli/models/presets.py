"""Target presets: what a layer is for, by its name, and the names that choose a preset's layers.

    attention               what makes queries, keys and values
    projection              what writes back into the residual stream, after attention and after
                            the feed-forward part (all of GPT-2's c_proj; o_proj and down_proj)
    mlp                     the feed-forward part, in and out
    attention+projection    both of the first two
    all-linear              every linear layer but the output head, as in PEFT

A layer's role comes from the longest end of its path in `ROLES`. Where a name is not there, the
part of the model it stands in decides, and the name is reported as guessed; where that says
nothing either, only all-linear takes the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loftq_cli.formats import ALL_LINEAR
from loftq_cli.models.kinds import shortest_names
from loftq_cli.models.layers import LinearLayer

Role: TypeAlias = Literal["attention-in", "attention-out", "mlp-in", "mlp-out"]

ROLE_NAMES: dict[Role, str] = {
    "attention-in": """
        q_proj k_proj v_proj qkv_proj kv_proj q k v query key value qkv c_attn q_attn Wqkv Wq Wk Wv
        query_proj key_proj value_proj query_key_value q_a_proj q_b_proj kv_a_proj_with_mqa
        kv_b_proj q_lin k_lin v_lin project_q project_k project_v in_proj_qkv in_proj_qkvz
        q_proj.linear k_proj.linear v_proj.linear v_proj_current v_proj_delayed
        attention.receptance self_attn.gate_proj self_attn.g_proj linear_attn.g_proj in_proj_z
    """,
    "attention-out": """
        o_proj o out_proj out_lin attention_out attn.c_proj attn.Wo attn.proj attention.dense
        self_attention.dense self_attn.dense multi_head_attention.dense attention.output.dense
        attention.output o_proj.linear o_b_proj
    """,
    "mlp-in": """
        gate_proj up_proj gate_up_proj c_fc fc1 fc_in fc dense_h_to_4h w1 w3 wi wi_0 wi_1 mlp.Wi
        lin1 intermediate.dense feed_forward.intermediate dense1 layer_1 proj_up proj_up_gate
        w_0 w_1 input_linear ffn.0 feed_forward.key feed_forward.receptance mlp.lin1
    """,
    "mlp-out": """
        down_proj mlp.c_proj fc2 fc_out dense_4h_to_h w2 wo mlp.Wo lin2 output.dense dense2
        feed_forward.output layer_2 proj_down w_out output_linear ffn.2 feed_forward.value
    """,
}
# State-space and convolution mixers and expert routers have layers of the same names.
NO_ROLE = """
    mixer.in_proj mixer.out_proj mamba.in_proj mamba.out_proj conv.in_proj conv.out_proj
    mlstm_layer.q mlstm_layer.k mlstm_layer.v mlstm_layer.out_proj
    router.gate router.classifier router_mlp.fc1 router_mlp.fc2 gate.down_proj
"""
ROLES: dict[str, Role | None] = {
    **{name: role for role, names in ROLE_NAMES.items() for name in names.split()},
    **dict.fromkeys(NO_ROLE.split()),
}

_ATTENTION_PLACES = {
    "attn", "self_attn", "attention", "self_attention", "attentions", "cross_attn", "linear_attn",
    "encoder_attn", "SelfAttention", "EncDecAttention", "multi_head_attention", "temporal_block",
}  # fmt: skip
_MLP_PLACES = {"mlp", "ffn", "feed_forward", "ff", "DenseReluDense", "shared_expert", "mlps"}

PRESETS: dict[str, tuple[Role, ...]] = {
    "attention": ("attention-in",),
    "projection": ("attention-out", "mlp-out"),
    "mlp": ("mlp-in", "mlp-out"),
    "attention+projection": ("attention-in", "attention-out", "mlp-out"),
}


@dataclass(frozen=True)
class Preset:
    """``target_modules`` as it goes into --target-modules; empty where no layer has the role."""

    name: str
    target_modules: list[str]
    layers: tuple[LinearLayer, ...]


def presets(layers: Sequence[LinearLayer]) -> list[Preset]:
    """Every preset in this model's own names. Experts get no adapter."""
    adaptable = tuple(layer for layer in layers if not layer.expert)
    found = []
    for name, roles in PRESETS.items():
        chosen = tuple(layer for layer in adaptable if role_of(layer.module) in roles)
        found.append(Preset(name, shortest_names(chosen, layers), chosen))
    return [*found, Preset(ALL_LINEAR, [ALL_LINEAR], adaptable)]


def role_of(module: str) -> Role | None:
    """What the layer is for; None if neither its name nor its place says so."""
    tail = _known_tail(module)
    return ROLES[tail] if tail is not None else _guess(module)


def is_guessed(module: str) -> bool:
    """Whether only the layer's place in the model says what it is for."""
    return _known_tail(module) is None and _guess(module) is not None


def _known_tail(module: str) -> str | None:
    parts = module.split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if tail in ROLES), None)


def _guess(module: str) -> Role | None:
    *places, name = module.split(".")
    outward = "out" in name or "down" in name
    for place in reversed(places):
        if place in _ATTENTION_PLACES:
            return "attention-out" if outward else "attention-in"
        if place in _MLP_PLACES:
            return "mlp-out" if outward else "mlp-in"
    return None
