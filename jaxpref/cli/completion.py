"""A script that completes commands, options and names in bash and zsh."""

import importlib
from collections.abc import Iterable

from jaxpref.cli.options import Option, Part, options_of

SHELLS = ("bash", "zsh")

ZSH = """\
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""
BASH = """\
# Completion of jaxpref; use it with: source <(jaxpref --completion SHELL)
_jaxpref() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
  local loss=dpo objective=none noise=none words='' i
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W '{commands} --help --completion' -- "$current"))
    return
  fi
  for ((i = 2; i < COMP_CWORD - 1; i++)); do
    case ${{COMP_WORDS[i]}} in
      --loss) loss=${{COMP_WORDS[i+1]}} ;;
      --objective) objective=${{COMP_WORDS[i+1]}} ;;
      --objective.noise) noise=${{COMP_WORDS[i+1]}} ;;
    esac
  done
  case ${{COMP_WORDS[1]}},$previous in
{values}
    *,--*) [[ $current == -* ]] || return ;;
  esac
  if [[ -z $words ]]; then
    case ${{COMP_WORDS[1]}} in
{options}
    esac
    case ${{COMP_WORDS[1]}} in
      train | sweep | plan)
        case $loss in
{losses}
        esac
        case $objective in
{objectives}
        esac
        case $noise in
{noises}
        esac
        ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o bashdefault -o default -F _jaxpref jaxpref
"""


def completion_script(shell: str, commands: Iterable[str]) -> str:
    """The script for `shell`; it completes the options of the loss on the line."""
    from jaxpref.cli import objectives as table

    modules = {
        name: importlib.import_module(f"jaxpref.cli.{name}") for name in commands
    }
    by_command = {name: module.options() for name, module in modules.items()}
    values, options = [], []
    for name, found in by_command.items():
        chosen = {o.name: o.choices for o in found.values() if o.choices}
        words = _flags(o for o in found.values() if not o.name.startswith("loss."))
        if name in ("train", "sweep", "plan"):
            chosen |= {
                "loss": tuple(table.LOSSES),
                "correct": tuple(table.CORRECTIONS),
                "objective": tuple(table.WRAPPERS | table.MIXTURES),
                "objective.noise": tuple(table.NOISE),
            }
            words += " --loss --correct --correct.flip-rate --objective"
        if name in ("train", "sweep"):
            words += " --help-all"
        if name == "data":
            words = f"{' '.join(modules[name].PARTS)} {words}"
        values += [
            f"    {name},--{option}) words='{' '.join(choices)}' ;;"
            for option, choices in chosen.items()
        ]
        options.append(f"      {name}) words='{words} --help' ;;")
    case = lambda name, words: f"          {name}) words+=' {words}' ;;"
    return (ZSH if shell == "zsh" else "") + BASH.format(
        commands=" ".join(by_command),
        values="\n".join(values),
        options="\n".join(options),
        losses="\n".join(
            case(name, _flags(options_of(table.Choice(name).parts).values()))
            for name in table.LOSSES
        ),
        objectives="\n".join(
            [case(n, _own(n)) for n in table.WRAPPERS]
            + [case(n, f"--objective.noise {_own(None, n)}") for n in table.MIXTURES]
        ),
        noises="\n".join(case(n, _flags_of_noise(n)) for n in table.NOISE),
    )


def _flags(options: Iterable[Option]) -> str:
    return " ".join(
        f"--no-{o.name}" if o.default is True else f"--{o.name}" for o in options
    )


def _own(wrapper: str | None, mixture: str | None = None) -> str:
    from jaxpref.cli.objectives import Choice
    from jaxpref.data.options import MixOptions

    choice = Choice(wrapper=wrapper, mixture=mixture)
    mixed = {"mix": Part(MixOptions)} if mixture else {}
    found = options_of({**choice.parts, **mixed}).values()
    return _flags(o for o in found if not o.name.startswith("loss."))


def _flags_of_noise(name: str) -> str:
    own = _own(name)
    return own.replace("--objective.", "--objective.noise.")
