"""`clipgraft completion`: a script that completes commands, flags and their values, for three shells.

The script holds everything, so that a press of TAB starts no Python. It is made from the declarations that
the commands themselves are parsed with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from clipgraft.cli.declared import declared
from clipgraft.cli.flags.groups import Group, flag, positional_fields
from clipgraft.cli.flags.shell import CompletionFlags
from clipgraft.cli.main import VERBS
from clipgraft.cli.parser import choices_of, in_help, is_marked, metavar, parse
from clipgraft.cli.terminal import wording
from clipgraft.options import Repeated, Several

_SUMMARY = """Print a script that completes commands, flags and values.

bash: save it as ~/.local/share/bash-completion/completions/clipgraft, or add to ~/.bashrc
  eval "$(clipgraft completion bash)"
zsh: save it as _clipgraft in a folder of $fpath, or add to ~/.zshrc, after compinit
  eval "$(clipgraft completion zsh)"
fish: save it as ~/.config/fish/completions/clipgraft.fish"""
_LONGEST = 90
# Words that a flag takes beside names and paths, which no declaration lists.
_WORDS = {
    "device": ("auto", "cpu", "cuda", "mps", "xpu"),
    "model": ("emoji",),
    "pretrained": ("none",),
    "retain": ("auto", "none"),
}
_HEAD = "# Completion of clipgraft {version} for {shell}, written by `clipgraft completion {shell}`."


@dataclass(frozen=True)
class Value:
    """What may follow a flag, or stand in a place.

    Attributes:
        label: what stands for it in the help.
        choices: the words that are allowed; empty where there is no list.
        files: whether names of files are offered.
        many: it may be several words.
    """

    label: str
    choices: tuple[str, ...] = ()
    files: bool = False
    many: bool = False


@dataclass(frozen=True)
class Flag:
    """A flag, its line of help, and what follows it; None for a switch."""

    name: str
    text: str
    value: Value | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Command:
    """A command with what can be typed after it."""

    verb: str
    text: str
    flags: tuple[Flag, ...]
    places: tuple[Value, ...]


def run_completion(argv: Sequence[str]) -> None:
    """Parse, and print the script."""
    (spec,) = parse("completion", _SUMMARY, [CompletionFlags], argv)
    print(script(spec.shell, [command(verb, declared(verb)) for verb in VERBS]))


def script(shell: str, commands: Sequence[Command]) -> str:
    """Return the script for bash, zsh or fish."""
    from clipgraft import __version__

    written: dict[str, Callable[[Sequence[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    head = _HEAD.format(version=__version__, shell=shell)
    # zsh looks for #compdef on the first line.
    return (
        f"#compdef clipgraft\n{head}\n{_zsh(commands)}"
        if shell == "zsh"
        else f"{head}\n{written[shell](commands)}"
    )


def command(verb: str, groups: Sequence[Group]) -> Command:
    """Collect what can be typed after a command."""
    wording.learn(groups)
    places = positional_fields(groups)
    flags = [Flag("--help", "show the help of this command")]
    flags.append(Flag("--config", "read flags from a file", Value("YAML", files=True)))
    at: dict[str, Value] = {}
    for _, name, info in in_help(groups):
        if name in places:
            at[name] = _places_of_commands(verb, name) or _value(name, info, name.upper(), places[name])
        else:
            flags += _flags(name, info)
    return Command(verb, VERBS[verb], tuple(flags), tuple(at[name] for name in places))


def _places_of_commands(verb: str, name: str) -> Value | None:
    """Return the commands, where the name of one is wanted."""
    return Value("COMMAND", tuple(VERBS)) if (verb, name) == ("config", "command") else None


def _flags(name: str, info: FieldInfo) -> Iterator[Flag]:
    text = " ".join(re.split(r" \(default|;", wording(info.description or ""))[0].split())
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    if info.annotation is bool:
        yield Flag(flag(name), text)
        yield Flag(flag(f"no_{name}"), f"not: {text}")
        return
    several = is_marked(info, Several)
    yield Flag(
        flag(name), text, _value(name, info, metavar(info), several), several or is_marked(info, Repeated)
    )


def _value(name: str, info: FieldInfo, label: str, many: bool) -> Value:
    kind = metavar(info)
    files = kind in ("PATH", "TEXT", "A,B") and not is_marked(info, Repeated)
    words = _WORDS.get(name, ())
    choices = tuple(choices_of(info))
    return Value("value" if choices else label, choices or words, files and name != "device", many)


def _bash(commands: Sequence[Command]) -> str:
    cases = "\n".join(f"        {each.verb})\n{_bash_case(each)}\n            ;;" for each in commands)
    return _BASH.format(verbs=" ".join((*VERBS, "--help", "--version")), cases=cases)


def _bash_case(each: Command) -> str:
    """Set the variables of the function for one command."""
    lines = [f"flags='{' '.join(flag.name for flag in each.flags)}'"]
    by_words: dict[str, list[str]] = {}
    for option in each.flags:
        if option.value is not None:
            by_words.setdefault(f"takes='{_bash_words(option.value)}'", []).append(option.name)
    many = [option.name for option in each.flags if option.value is not None and option.value.many]
    lines.append("case $owner in")
    lines += [f"    {'|'.join(names)}) {words} ;;" for words, names in by_words.items()]
    lines.append("esac")
    if many:
        lines.append(f"case $owner in {'|'.join(many)}) many=1 ;; esac")
    if each.places:
        words = {_bash_words(value) for value in each.places}
        lines.append(f"place='{' '.join(sorted(words))}'")
    return "\n".join(f"            {line}" for line in lines)


def _bash_words(value: Value) -> str:
    """`<files>` for names of files, `<nothing>` for a number, the choices where there are some."""
    return " ".join([*value.choices, *(["<files>"] if value.files else [])]) or "<nothing>"


_BASH = """\
_clipgraft() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} at=$COMP_CWORD owner='' flags='' takes='' place='' many='' words
    local IFS=$' \\t\\n'
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '{verbs}' -- "$cur"))
        return
    fi
    # The flag before this word; bash takes the = of --flag=value for a word.
    while ((--at > 1)); do
        if [[ ${{COMP_WORDS[at]}} == -* ]]; then owner=${{COMP_WORDS[at]}}; break; fi
    done
    local between=$((COMP_CWORD - at - 1))
    if [[ $cur == '=' ]]; then
        cur=''
    elif [[ ${{COMP_WORDS[COMP_CWORD - 1]}} == '=' ]]; then
        between=$((between - 1))
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [[ $cur == -* ]]; then
        words=$flags
    elif [[ -n $takes ]] && {{ ((between == 0)) || [[ -n $many ]]; }}; then
        words=$takes
    else
        words=$place
    fi
    if [[ " $words " == *' <files> '* ]]; then
        compopt -o filenames 2>/dev/null
        IFS=$'\\n'
        COMPREPLY=($(compgen -f -- "$cur"))
        IFS=$' \\t\\n'
    fi
    words=${{words//<files>/}}
    COMPREPLY+=($(compgen -W "${{words//<nothing>/}}" -- "$cur"))
}}
complete -F _clipgraft clipgraft"""


def _zsh(commands: Sequence[Command]) -> str:
    listed = "\n".join(f"        {_quoted(f'{each.verb}:{each.text}')}" for each in commands)
    cases = "\n".join(
        f"        {each.verb})\n            _arguments -S \\\n{_zsh_case(each)}\n            ;;"
        for each in commands
    )
    return _ZSH.format(listed=listed, cases=cases)


def _zsh_case(each: Command) -> str:
    specs = [_zsh_flag(option) for option in each.flags]
    for number, value in enumerate(each.places, 1):
        specs.append(f"{'*' if value.many else number}:{_zsh_text(value.label)}:{_zsh_action(value)}")
    return " \\\n".join(f"                {_quoted(spec)}" for spec in specs)


def _zsh_flag(option: Flag) -> str:
    text = f"[{_zsh_text(option.text)}]"
    star = "*" if option.repeated else ""
    if option.value is None:
        return f"{option.name}{text}"
    rest = "*-*:" if option.value.many else ""
    return f"{star}{option.name}={text}:{rest}{_zsh_text(option.value.label)}:{_zsh_action(option.value)}"


def _zsh_action(value: Value) -> str:
    if value.choices and value.files:
        return f" _clipgraft_words_or_files {' '.join(value.choices)}"
    if value.choices:
        return f"({' '.join(value.choices)})"
    return "_files" if value.files else " "


def _zsh_text(text: str) -> str:
    return re.sub(r"([\\\[\]:])", r"\\\1", text)


_ZSH = """\
_clipgraft_words_or_files() {{
    compadd -- "$@"
    _files
}}
_clipgraft() {{
    local -a commands=(
{listed}
    )
    if (( CURRENT == 2 )); then
        _describe -t commands command commands -- '(--help --version)'
        return
    fi
    shift words
    (( CURRENT-- ))
    case $words[1] in
{cases}
    esac
}}
if [[ $funcstack[1] == _clipgraft ]]; then _clipgraft "$@"; else compdef _clipgraft clipgraft; fi"""


def _fish(commands: Sequence[Command]) -> str:
    lines = [_FISH]
    lines += [
        f"complete -c clipgraft -n __clipgraft_first -a {each.verb} -d {_fish_quoted(each.text)}"
        for each in commands
    ]
    for each in commands:
        after = f"complete -c clipgraft -n '__clipgraft_after {each.verb}'"
        for option in each.flags:
            words = f" -l {option.name.removeprefix('--')}{_fish_value(option.value)}"
            lines.append(f"{after}{words} -d {_fish_quoted(option.text)}")
        if many := [option.name for option in each.flags if option.value is not None and option.value.many]:
            lines.append(f"{after[:-1]}; and __clipgraft_within {' '.join(many)}' -F")
        if any(value.files for value in each.places):
            lines.append(f"{after} -F")
        lines += [f"{after} -a '{' '.join(value.choices)}'" for value in each.places if value.choices]
    return "\n".join(lines)


def _fish_value(value: Value | None) -> str:
    if value is None:
        return ""
    words = f" -a '{' '.join(value.choices)}'" if value.choices else ""
    return f"{' -r -F' if value.files else ' -x'}{words}"


_FISH = """\
function __clipgraft_first
    test (count (commandline -opc)) -eq 1
end
function __clipgraft_after
    set -l words (commandline -opc)
    test (count $words) -gt 1; and test "$words[2]" = $argv[1]
end
function __clipgraft_within
    contains -- (string match -- '-*' (commandline -opc))[-1] $argv
end
complete -c clipgraft -f
complete -c clipgraft -n __clipgraft_first -l help -d 'list the commands'
complete -c clipgraft -n __clipgraft_first -l version -d 'print the version'"""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
