from datetime import datetime
from pathlib import Path

import pytest
import transformers

from runtime.chat_template import ChatTemplate
from runtime.errors import UserError

CHAT = [
    {"role": "user", "content": "a<b"},
    {"role": "assistant", "content": "é"},
    {"role": "user", "content": "c"},
]


def template(tmp_path: Path, text: str) -> ChatTemplate:
    return ChatTemplate(text, tmp_path / "chat_template.jinja")


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}\n  {% if loop.first %}{{ bos_token }}{% endif %}\n{{ m.role }}{% endfor %}",
        "{%- for m in messages -%} {{ m | tojson }} {{ m | tojson(indent=2) }} {%- endfor -%}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ eos_token is defined }}",
    ],
)  # fmt: skip
def test_what_templates_use_renders_as_in_transformers(tmp_path: Path, text: str) -> None:
    rendered = template(tmp_path, text).render(CHAT, {"bos_token": "<s>"})
    expected, _ = transformers.utils.chat_template_utils.render_jinja_template(
        conversations=[CHAT], chat_template=text, add_generation_prompt=True, bos_token="<s>"
    )
    assert rendered == expected[0]


@pytest.mark.parametrize("said", ["It is", "It is  ", " a\nb"])
@pytest.mark.parametrize("filters", ["", " | trim"])
def test_a_last_message_is_left_open_as_by_transformers(tmp_path: Path, filters: str, said: str) -> None:
    text = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content" + filters + " }}</s>{% endfor %}{{ add_generation_prompt }}"
    )
    chat = [*CHAT, {"role": "assistant", "content": said}]
    expected, _ = transformers.utils.chat_template_utils.render_jinja_template(
        conversations=[chat], chat_template=text, continue_final_message=True
    )
    assert template(tmp_path, text).render_unfinished(chat, {}) == expected[0]


@pytest.mark.parametrize(
    ("text", "said", "message"),
    [
        ("{{ messages[0].content }}", "It is", "leaves out what the last message says"),
        ("{{ messages[-1].content | tojson }}", "a\nb", "leaves out what the last message says"),
        ("{{ messages[-1].content }}", [{"type": "text", "text": "a"}], "found list as its content"),
    ],
)
def test_a_last_message_that_cannot_be_left_open_is_refused(
    tmp_path: Path, text: str, said: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        template(tmp_path, text).render_unfinished([*CHAT, {"role": "assistant", "content": said}], {})


def test_the_date_is_today(tmp_path: Path) -> None:
    rendered = template(tmp_path, "{{ strftime_now('%Y') }}").render(CHAT, {})
    assert abs(int(rendered) - datetime.now().year) <= 1


def test_a_template_may_refuse_a_conversation_in_its_own_words(tmp_path: Path) -> None:
    refusing = template(tmp_path, "{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(UserError, match=r"chat_template.jinja refuses: roles must alternate; change the messages"):
        refusing.render(CHAT, {})


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ missing.attribute }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"chat_template.jinja refuses: "):
        template(tmp_path, text).render(CHAT, {})


def test_a_template_that_is_not_valid_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat_template.jinja refuses: "):
        template(tmp_path, "{% for %}")
