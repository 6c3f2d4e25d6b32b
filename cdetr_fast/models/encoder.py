"""The transformer encoder over the flattened feature map."""

import torch
from torch import Tensor, nn

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.models.activations import ACTIVATIONS
from cdetr_fast.models.attention import ConditionalDetrSelfAttention
from cdetr_fast.models.outputs import EncoderOutput
from cdetr_fast.models.position import MapPosition
from cdetr_fast.models.recompute import DEFAULT_OPTIONS, recompute
from cdetr_fast.models.residual import UpdateBlock, add_and_norm, dropout


class ConditionalDetrMLP(UpdateBlock):
    """Feed-forward block of an encoder or decoder layer, `[..., C] -> [..., C]`."""

    output_layer = "fc2"

    def __init__(self, config: ConditionalDetrConfig, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, config.d_model)
        self.activation_fn = ACTIVATIONS[config.activation_function]()
        self.activation_dropout = config.activation_dropout
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training)
        return dropout(self.project_output(hidden, x), self.dropout, self.training)


class ConditionalDetrEncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by residual and layer norm."""

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__()
        self.self_attn = ConditionalDetrSelfAttention(
            config.d_model, config.encoder_attention_heads, config.attention_dropout, config
        )
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.mlp = ConditionalDetrMLP(config, config.encoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = config.dropout

    def forward(
        self,
        hidden_states: Tensor,
        position: MapPosition,
        key_mask: Tensor | None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer; shapes as in `ConditionalDetrSelfAttention.forward`."""
        update, attention = self.self_attn(hidden_states, position, key_mask, return_attention)
        update = dropout(update, self.dropout, self.training)
        hidden_states = add_and_norm(
            self.self_attn_layer_norm, hidden_states, self.self_attn, update
        )
        update = self.mlp(hidden_states)
        hidden_states = add_and_norm(self.final_layer_norm, hidden_states, self.mlp, update)
        if self.training and hidden_states.dtype == torch.float16:
            # fp16 overflows where bf16 and fp32 do not; clamping always does not wait for a GPU.
            limit = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        return hidden_states, attention


class ConditionalDetrEncoder(nn.Module):
    """Stack of encoder layers."""

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ConditionalDetrEncoderLayer(config) for _ in range(config.encoder_layers)
        )
        self.dropout = config.dropout
        self.layerdrop = config.encoder_layerdrop
        self.gradient_checkpointing = False
        self.checkpoint_options = DEFAULT_OPTIONS

    def forward(
        self,
        features: Tensor,
        position: MapPosition,
        mask: Tensor | None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encode the flattened map.

        Args:
            features: `[B, S, C]`.
            position: Position code of the map.
            mask: bool `[B, S]`, True = unpadded, or None.
            output_attentions: Return the attention maps.
            output_hidden_states: Return the input and output of every layer.
        """
        hidden_states = dropout(features, self.dropout, self.training)
        all_states = [hidden_states]
        attentions: list[Tensor] = []
        for layer in self.layers:
            if skip_layer(self.training, self.layerdrop):
                continue
            arguments = (hidden_states, position, mask, output_attentions)
            if self.gradient_checkpointing and self.training:
                hidden_states, attention = recompute(layer, arguments, self.checkpoint_options)
            else:
                hidden_states, attention = layer(*arguments)
            all_states.append(hidden_states)
            attentions.append(attention)
        return EncoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def skip_layer(training: bool, layerdrop: float) -> bool:
    """Draw whether layer drop leaves this layer out of a step (host generator, no sync)."""
    return training and layerdrop > 0.0 and bool(torch.rand((), device="cpu") < layerdrop)
