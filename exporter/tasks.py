"""The five heads, what a graph of each can be, and which combinations each target carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.contract import END_LOGITS, LAST_HIDDEN_STATE, LOGITS, START_LOGITS
from runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import NemotronPreTrainedModel

GENERATION = "text-generation"
FEATURES = "feature-extraction"
SEQUENCES = "text-classification"
TOKENS = "token-classification"
ANSWERS = "question-answering"


@dataclass(frozen=True)
class Task:
    """A head of the architecture.

    Attributes:
        name: the task's name, as in manifests.
        architecture: transformers' class.
        head: the name of the module on top of the base model; None where there is none.
        outputs: what the graph hands out besides cache and options.
    """

    name: str
    architecture: str
    head: str | None
    outputs: tuple[str, ...]

    def build(self, config: object) -> NemotronPreTrainedModel:
        """transformers' model of this head, on the current device."""
        import transformers

        model: NemotronPreTrainedModel = getattr(transformers, self.architecture)(config)
        return model


TASKS = {
    task.name: task
    for task in (
        Task(GENERATION, "NemotronForCausalLM", "lm_head", (LOGITS,)),
        Task(FEATURES, "NemotronModel", None, (LAST_HIDDEN_STATE,)),
        Task(SEQUENCES, "NemotronForSequenceClassification", "score", (LOGITS,)),
        Task(TOKENS, "NemotronForTokenClassification", "score", (LOGITS,)),
        Task(ANSWERS, "NemotronForQuestionAnswering", "qa_outputs", (START_LOGITS, END_LOGITS)),
    )
}
ARCHITECTURES = {task.architecture: task for task in TASKS.values()}


@dataclass(frozen=True)
class GraphForm:
    """What a graph takes and gives beyond its task.

    Attributes:
        cache: keys and values go in and out, new tokens at a time; else every run is of whole rows.
        embeds: `inputs_embeds` in place of `input_ids`.
        position_ids: the tokens' positions are an input.
        hidden_states: the output of the embedding, of every layer and of the final norm are handed out.
        attentions: each layer's attention weights are handed out.
    """

    cache: bool = True
    embeds: bool = False
    position_ids: bool = False
    hidden_states: bool = False
    attentions: bool = False


# Which option goes with which graphs of which target: text generation with its cache, without (--no-cache), and the
# other heads, which have none. What is not listed is refused. GroupQueryAttention gives no attention weights, and
# TensorRT's native attention gives none either; engines are bound to ids, derived positions and logits.
CACHED, UNCACHED, HEAD = "text generation with a cache", "text generation with --no-cache", "the other tasks"
_ANY = (CACHED, UNCACHED, HEAD)
CARRIED: dict[str, dict[str, tuple[str, ...]]] = {
    "onnxruntime": {
        "--inputs embeds": _ANY,
        "--position-ids": _ANY,
        "--output-hidden-states": _ANY,
        "--output-attentions": (UNCACHED, HEAD),
    },
    "tensorrt": {
        "--inputs embeds": (),
        "--position-ids": (),
        "--output-hidden-states": (UNCACHED, HEAD),
        "--output-attentions": (),
    },
}


def check_form(form: GraphForm, task: str, target: str) -> None:
    """Refuse an option that this target's graphs of this task do not carry.

    Raises:
        UserError: it names the option and what carries it.
    """
    kind = (CACHED if form.cache else UNCACHED) if task == GENERATION else HEAD
    asked = {
        "--inputs embeds": form.embeds,
        "--position-ids": form.position_ids,
        "--output-hidden-states": form.hidden_states,
        "--output-attentions": form.attentions,
    }
    for option, given in asked.items():
        if given and kind not in CARRIED[target][option]:
            places = [f"{other}: {', '.join(kinds)}" for other in CARRIED if (kinds := CARRIED[other][option])]
            raise UserError(
                f"{option} is not carried by target {target} for {kind}; it is by target {'; and '.join(places)}"
            )
