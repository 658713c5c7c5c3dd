#!/usr/bin/env bash
# Stands in for `gcloud`, python3.12, gcsfuse, and mountpoint in tests/test_launch_tpu.py.
#
# $STUB holds: calls (one line per call), scenario (events to inject, "KEY CODE TEXT", each
# line used once; "KEY 0 damaged" loses the end of a copy or of the output), state (of the queued resource), homes/NODE-WORKER (each worker's home,
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

ssh_() { # DAMAGE ARGUMENTS: runs the command; loses the last line if there is damage
  if [[ -n $1 ]]; then
    shift
    run_ "$@" | sed '$d'
  else
    shift
    run_ "$@"
  fi
}

run_() {
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

copy() { # DAMAGE FILE...: the last one is the target
  local damage=$1 files
  shift
  cp -R "$@"
  [[ -n $damage ]] || return 0
  files=("${*: -1}")
  [[ ! -d ${files[0]} ]] || mapfile -t files < <(find "${files[0]}" -type f ! -name '.*')
  truncate -s -2 "${files[0]}"
}

gcloud_() {
  local key=${5-} CODE=0 TEXT='' home damage=''
  [[ $2 != storage ]] || key=$3
  if [[ $key == ssh ]]; then
    key=$(option --command "$@" | sed -n '1s/^# jaxpref: //p')
    key=${key:-other}
  elif [[ $key == scp ]]; then
    [[ $6 != *environment ]] || key=scp-environment
    [[ $6 != *:* ]] || key=scp-results
  elif [[ $4 == tpu-vm ]]; then
    key=node
    [[ $* != *networkEndpoints* ]] || key=endpoints
  elif [[ $* == *nodeSpec* ]]; then
    key=nodes
  fi
  if next "$key"; then
    # "after FILE STATE": waits until the experiment has written FILE;
    # "after FILE interrupted": the workers get SIGTERM while the state is still ACTIVE.
    if [[ $TEXT == after\ * ]]; then
      touch "$STUB/asked"
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
    [[ $TEXT != damaged ]] || damage=1
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
    nodes) # homes/NODE-WORKER
      for home in "$STUB"/homes/*-0; do
        home=${home##*/}
        echo "$6-${home%-0}"
      done
      ;;
    endpoints)
      for home in "$STUB/homes/${6##*-}"-*; do echo "10.0.0.${home##*-}"; done
      ;;
    create)
      local count
      count=$(option --node-count "$@")
      make_nodes "${count:-1}"
      echo ACTIVE >"$STUB/state"
      ;;
    delete) [[ -n $damage ]] || become ABSENT ;;
    scp | scp-environment)
      [[ $key == scp ]] || stat -c %a "$6" >>"$STUB/modes"
      for home in "$STUB"/homes/*; do copy "$damage" "$6" "$home/$(basename "$6")"; done
      ;;
    scp-results) copy "$damage" "$STUB/homes/0-0/${6#*:}" "$7" ;;
    rsync) copy "$damage" "$STUB/gs/${4#gs://}/." "$5" ;;
    *) ssh_ "$damage" "$@" ;;
  esac
}

case $(basename "$0") in
  gcloud)
    printf '%s\n' "gcloud ${*%%$'\n'*}" | tr '\n' ' ' | sed 's/ *$/\n/' >>"$STUB/calls"
    printf '%s\n' "$@" >>"$STUB/arguments"
    gcloud_ gcloud "$@"
    ;;
  mountpoint) [[ -L $2 ]] ;;
  gcsfuse)
    echo "gcsfuse $*" >>"$STUB/calls"
    ! next gcsfuse || { echo "gcsfuse: $TEXT" >&2 && exit "$CODE"; }
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
      *)
        if [[ -n ${QUICK-} ]]; then # without the supervisor
          while [[ $1 != -- ]]; do shift; done
          shift
          exec "$@"
        fi
        exec "$REAL_PYTHON" "$@"
        ;;
    esac
    ;;
esac
