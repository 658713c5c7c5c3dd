#!/usr/bin/env bash
# Stands in for `gcloud`, python3.12, gcsfuse, and mountpoint in tests/test_launch_tpu.py.
#
# $STUB holds: calls (one line per call), scenario (events to inject, "KEY CODE TEXT", each
# line used once), state (of the queued resource), homes/NODE-WORKER (each worker's home,
# where the workers' commands are actually run), gs/ (buckets).
# shellcheck disable=SC2153 # WORKER is set for the commands of a worker
set -euo pipefail

next() { # KEY: removes the scenario's first line for it and sets CODE and TEXT
  local found
  found=$(grep -n -m 1 "^$1 " "$STUB/scenario") || return 1
  sed -i "${found%%:*}d" "$STUB/scenario"
  read -r _ CODE TEXT <<<"${found#*:}"
}

signal_nodes() {
  local pid
  for pid in "$STUB"/homes/*/jaxpref/pid; do
    [[ ! -e $pid ]] || kill "-$1" -- "-$(head -n 1 "$pid")" 2>/dev/null || true
  done
}

become() {
  echo "$1" >"$STUB/state"
  case $1 in ABSENT | SUSPENDED)
    signal_nodes KILL
    rm -rf "$STUB/homes"
    ;;
  esac
}

make_nodes() {
  local node worker
  for ((node = 0; node < $1; node++)); do
    for ((worker = 0; worker < ${WORKERS:-2}; worker++)); do
      mkdir -p "$STUB/homes/$node-$worker"
    done
  done
}

option() { # NAME ARGUMENTS: prints the value of the option
  local name=$1 each
  shift
  for each in "$@"; do [[ $each != "$name="* ]] || printf '%s' "${each#*=}"; done
}

ssh_() {
  local command homes home status=0
  command=$(option --command "$@")
  homes=("$STUB"/homes/*)
  [[ $(option --worker "$@") == all ]] || homes=("$STUB/homes/0-0")
  [[ -d ${homes[0]} ]] || { echo "ssh: no route to host" >&2 && return 255; }
  for home in "${homes[@]}"; do
    (cd "$home" && HOME=$home WORKER=$(basename "$home") bash -c "$command") || {
      status=$?
      echo "##### Command execution on worker ${home##*-} failed" >&2
    }
  done
  return "$status"
}

gcloud_() {
  local key=${5-} CODE=0 TEXT='' home
  [[ $2 != storage ]] || key=$3
  if [[ $key == ssh ]]; then
    key=$(option --command "$@" | sed -n '1s/^# jaxpref: //p')
    key=${key:-other}
  elif [[ $4 == tpu-vm ]]; then
    key=node
  fi
  if next "$key"; then
    # "after FILE STATE": waits until the experiment has written FILE;
    # "after FILE interrupted": the workers get SIGTERM while the state is still ACTIVE.
    if [[ $TEXT == after\ * ]]; then
      read -r _ file TEXT <<<"$TEXT"
      for _ in $(seq 600); do
        [[ ! -e $STUB/$file ]] || break
        sleep 0.05
      done
    fi
    if [[ $TEXT == interrupted ]]; then
      signal_nodes TERM
      TEXT=ACTIVE
    elif [[ $key == describe && $CODE == 0 ]]; then
      become "$TEXT"
    fi
    ((CODE == 0)) || { echo "ERROR: (gcloud) $TEXT" >&2 && exit "$CODE"; }
    if [[ $key == describe || $key == node ]]; then echo "$TEXT" && return; fi
  fi
  case $key in
    describe)
      if [[ $(cat "$STUB/state") == ABSENT ]]; then
        echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2
        exit 1
      fi
      cat "$STUB/state"
      ;;
    node) echo READY ;;
    create)
      local count
      count=$(option --node-count "$@")
      make_nodes "${count:-1}"
      echo ACTIVE >"$STUB/state"
      ;;
    delete) become ABSENT ;;
    scp)
      for home in "$STUB"/homes/*; do cp "$6" "$home/"; done
      ;;
    rsync) cp -R "$STUB/gs/${4#gs://}/." "$5" ;;
    *) ssh_ "$@" ;;
  esac
}

case $(basename "$0") in
  gcloud)
    printf '%s\n' "gcloud ${*%%$'\n'*}" | tr '\n' ' ' | sed 's/ *$/\n/' >>"$STUB/calls"
    gcloud_ gcloud "$@"
    ;;
  mountpoint) [[ -L $2 ]] ;;
  gcsfuse)
    echo "gcsfuse $*" >>"$STUB/calls"
    mkdir -p "$STUB/gs/${*: -2:1}"
    rmdir "${*: -1}"
    ln -s "$STUB/gs/${*: -2:1}" "${*: -1}"
    ;;
  python3.12) # -m venv DIR
    mkdir -p "$3/bin"
    ln -s "$0" "$3/bin/python"
    ;;
  python)
    case "$*" in
      *"pip install"*)
        echo "$WORKER pip $*" >>"$STUB/calls"
        ! next "pip-$WORKER" || { echo "pip: $TEXT" >&2 && exit "$CODE"; }
        ;;
      *"pip freeze"*)
        next "freeze-$WORKER" || TEXT=jax==0.12.0
        echo "$TEXT"
        ;;
      *) exec "$REAL_PYTHON" "$@" ;;
    esac
    ;;
esac
