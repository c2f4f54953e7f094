"""Chat templates: transformers' renderings, the limits, and programs that mean harm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime

import jinja2
import pytest

from lumen.errors import DataError
from lumen.text import template as template_module
from lumen.text.template import ChatTemplate

GOLDEN_DAY = datetime(2026, 11, 22)  # the day on which the goldens were rendered
GOLDEN_NAMES = {"pad_token": "<PAD>", "unk_token": "<UNK>", "date_string": "26 Jul 2024"}
HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages=HELLO, **variables) -> str:
    return ChatTemplate(source, "<BOS>", "<EOS>").render(messages, **variables)


def test_all_420_goldens_are_rendered_or_refused_as_transformers_does(shared_data):
    folder = shared_data / "chat_templates"
    inputs = json.loads((folder / "inputs.json").read_text())
    goldens = [json.loads(line) for line in (folder / "goldens.jsonl").read_text().splitlines()]
    assert len(goldens) == 420
    for golden in goldens:
        source = (folder / golden["template"]).read_text()
        chat = ChatTemplate(source, "<BOS>", "<EOS>", now=GOLDEN_DAY)
        if "error" in golden:
            with pytest.raises(DataError, match=rf"refuses this conversation: {golden['error']}: "):
                chat.render(**inputs[golden["case"]], **GOLDEN_NAMES)
        else:
            assert chat.render(**inputs[golden["case"]], **GOLDEN_NAMES) == golden["output"], golden


def test_generation_spans_are_those_of_transformers(shared_data):
    folder = shared_data / "chat_templates"
    inputs = json.loads((folder / "inputs.json").read_text())
    goldens = [json.loads(line) for line in (folder / "goldens.jsonl").read_text().splitlines()]
    marked = [golden for golden in goldens if "assistant_char_spans" in golden]
    marked = [golden for golden in marked if not inputs[golden["case"]]["add_generation_prompt"]]
    assert marked
    for golden in marked:
        case = inputs[golden["case"]]
        chat = ChatTemplate((folder / golden["template"]).read_text(), "<BOS>", "<EOS>")
        rendering = chat.render_marked(case["messages"], tools=case.get("tools"))
        assert rendering.text == golden["output"]
        assert [list(span) for span in rendering.spans] == golden["assistant_char_spans"]


def test_generation_spans_are_found_inside_a_set_block():
    source = "{% set turn %}  {% generation %}hi{% endgeneration %}  {% endset %}<{{ turn | trim }}>"
    rendering = ChatTemplate(source).render_marked(HELLO)
    assert rendering.text == "<hi>" and rendering.spans == ((1, 3),)


@pytest.mark.parametrize(
    "body",
    [
        "{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}",
        "{% set turn %}{% generation %}hello{% endgeneration %}{% endset %}{{ turn[:36] }}",
    ],
)
def test_generation_marks_that_are_nested_or_cut_are_refused(body):
    with pytest.raises(DataError, match="generation"):
        ChatTemplate(body).render_marked(HELLO)


# --- harm ------------------------------------------------------------------------------------------------------------

EXPLOITS = {
    "class of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class of a message": "{{ messages.__class__.__base__.__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') | attr('__mro__') }}",
    "attr filter, pieced": "{{ '' | attr('__cl' ~ 'ass__') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch OWNED').read() }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].system('touch OWNED') }}",
    "namespace": "{{ namespace.__init__.__globals__.os.system('touch OWNED') }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch OWNED') }}",
    "self's context": "{{ self._TemplateReference__context.environment.globals }}",
    "raise_exception": "{{ raise_exception.__globals__['json'] }}",
    "strftime_now": "{{ strftime_now.__globals__['sys'].modules }}",
    "loop": "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "format string (CVE-2016-10745)": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map (CVE-2019-10906)": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "stored format method (CVE-2024-56326)": "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "attr to format (CVE-2025-27516)": "{{ ('{0.__class__.__mro__}' | attr('format'))('') }}",
    "generator frame": "{{ (messages | map('string')).gi_frame.f_globals }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m.__init__.__globals__ }}",
    "undefined": "{{ nothing.__init__.__globals__ }}{{ nothing.__class__ }}",
    "changing the messages": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as p %}",
    "extends": "{% extends '/etc/passwd' %}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch OWNED').read() }}",
}


@pytest.mark.parametrize("name", EXPLOITS)
def test_an_exploit_raises_and_does_nothing(name, tmp_path, monkeypatch):
    template_module._child._stop()  # so that a new one starts, and would do its harm, here
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(DataError, match="refuses"):
        render(EXPLOITS[name], messages)
    assert messages == HELLO
    assert not any(tmp_path.iterdir())
    template_module._child._stop()


def test_jinja2_is_one_without_the_known_escapes():
    major, minor, patch = jinja2.__version__.split(".")
    assert (int(major), int(minor), int(patch)) >= (3, 1, 6)


BOMBS = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one endless operation": "{{ (9 ** (9 ** 9)) % 7 }}",
    "a text of 10 GB": "{{ ('x' * 10 ** 10) | length }}",
    "a doubling text": "{% set n = namespace(x='xxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a list of 10 GB": "{{ ([0] * 10 ** 10) | length }}",
    "a wide format": "{{ '%99999999999d' % 1 }}",
    "replace in replace": "{% set a = 'a' * 10 ** 6 %}{{ a.replace('a', a) | length }}",
    "endless output": "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "a huge range": "{{ range(10 ** 9) | list | length }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_stopped_and_the_next_rendering_works(name, monkeypatch):
    render("warm")
    monkeypatch.setattr(template_module, "TIME_LIMIT_S", 1.0)
    started = time.monotonic()
    with pytest.raises(DataError, match="refuses"):
        render(BOMBS[name])
    assert time.monotonic() - started < 4
    monkeypatch.undo()
    assert render("{{ messages[0].content }}") == "hello"


def test_output_up_to_the_limit_is_written_and_one_character_more_refused(monkeypatch):
    monkeypatch.setattr(template_module, "OUTPUT_LIMIT", 1000)
    assert len(render("{% for i in range(10) %}{{ 'x' * 100 }}{% endfor %}")) == 1000
    with pytest.raises(DataError, match="writes more than 1,000 characters"):
        render("{% for i in range(10) %}{{ 'x' * 100 }}{% endfor %}y")


def test_a_forked_process_renders_with_a_child_of_its_own():
    assert render("{{ messages[0].content }}") == "hello"
    if (pid := os.fork()) == 0:
        os._exit(0 if all(render(f"{{{{ {n} }}}}") == str(n) for n in range(50)) else 1)
    assert all(render(f"{{{{ {n} }}}}") == str(n) for n in range(100, 150))
    assert os.waitpid(pid, 0)[1] == 0


# --- the environment templates expect --------------------------------------------------------------------------------


def test_blocks_leave_no_lines_and_loops_can_be_left():
    source = (
        "{% for m in messages %}\n    {% if m.content == 'b' %}{% break %}{% endif %}\n{{ m.content }}\n{% endfor %}\n"
    )
    assert render(source, [{"content": "a"}, {"content": "b"}]) == "a\n"


def test_tojson_keeps_the_order_of_keys_and_characters_as_they_are():
    assert render("{{ messages[0] | tojson }}", [{"z": "ü<'&>", "a": 1}]) == '{"z": "ü<\'&>", "a": 1}'
    assert render("{{ messages[0] | tojson(indent=1) }}", [{"z": [1]}]) == '{\n "z": [\n  1\n ]\n}'


def test_strftime_now_tells_the_fixed_moment_and_otherwise_today():
    source = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(source, now=datetime(2024, 7, 26)).render(HELLO) == "26 Jul 2024"
    assert ChatTemplate(source).render(HELLO) == datetime.now().strftime("%d %b %Y")


def test_tools_documents_and_variables_reach_the_template():
    source = "{{ tools[0].name }} {{ documents[0].title }} {{ enable_thinking }} {{ bos_token }}{{ eos_token }}"
    rendered = render(source, tools=[{"name": "t"}], documents=[{"title": "d"}], enable_thinking=False)
    assert rendered == "t d False <BOS><EOS>"
    assert render("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}") == "True True False"


def test_a_variable_cannot_replace_a_function_of_the_template():
    with pytest.raises(DataError, match="raise_exception: a function of the chat template"):
        render("x", raise_exception=1)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(DataError, match="what JSON cannot"):
        render("x", [{"role": "user", "content": object()}])


def test_unusual_characters_pass_unchanged():
    content = "\x00 \ud800 🙂 \u2028 \r\n ﷽"
    assert render("{{ messages[0].content }}", [{"content": content}]) == content


def test_a_syntax_error_names_what_is_wrong():
    with pytest.raises(DataError, match=r"TemplateSyntaxError: .*endfor"):
        render("{% for m in messages %}")


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_continue_final_message_ends_with_the_last_word(trim):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content" + trim + " }}<end>{% endfor %}"
    messages = [*HELLO, {"role": "assistant", "content": "hello there"}]
    rendered = render(source, messages, continue_final_message=True)
    assert rendered == "<user>hello<end><assistant>hello there"
    parts = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "hello"}, {"type": "image"}]}]
    assert render("{{ messages[1].content[0].text }}!", parts, continue_final_message=True) == "hello"
    assert messages[1]["content"] == "hello there"


def test_continue_final_message_is_refused_where_it_cannot_be_kept():
    with pytest.raises(DataError, match="cannot be continued"):
        render("{{ messages[0].role }}", continue_final_message=True)
    with pytest.raises(DataError, match="exclude each other"):
        render("x", continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(DataError, match="last message with text"):
        render("x", [{"role": "user", "content": [{"type": "image"}]}], continue_final_message=True)


def test_an_interrupted_rendering_is_not_the_next_ones_reply():
    slow = ChatTemplate("{% for i in range(90000) %}{% for j in range(60) %}{% endfor %}{% endfor %}slow")
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        slow.render([])
    assert ChatTemplate("two").render([]) == "two"


def test_a_forked_copy_ends_without_the_renderer_of_its_parent():
    ChatTemplate("one").render([])
    code = (
        "import os, sys\nfrom lumen.text.template import ChatTemplate\nChatTemplate('one').render([])\n"
        "if os.fork() == 0: sys.exit(0)\nos.wait()\nprint(ChatTemplate('two').render([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "two\n", done.stderr
