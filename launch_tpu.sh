#!/usr/bin/env bash
# Runs an experiment on a Cloud TPU, restarts it after a preemption, and downloads its
# results.  See `./launch_tpu.sh --help` and docs/pods.md.
#
# This file, from top to bottom: help, options, printing or running commands, the scripts
# that run on a worker, one function per step, and the run that combines the steps.
#
# A test runs every gcloud command below through the parser of Google Cloud SDK 528.  The
# states come from its API, and the runtime versions from
# cloud.google.com/tpu/docs/runtimes.  So far the script has been tested only against a
# `gcloud` stub, not on a real TPU.
# shellcheck disable=SC2016 # most single-quoted strings are scripts for the workers
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'HELP'
usage: ./launch_tpu.sh COMMAND --name NAME --zone ZONE [options] [-- EXPERIMENT...]
       ./launch_tpu.sh --local N [--restarts N] [--dry-run] -- EXPERIMENT...

  run      do everything: create, wait, install, start, follow, fetch.  After a
           preemption, recreate the TPU and resume.  Repeat the command to reattach
  resume   same as run
  create   request the TPU (a queued resource) unless it already exists
  wait     wait until the TPU is ready; print a line for each change of state
  install  install code and environment on every worker; skip what is up to date
  start    start EXPERIMENT under `python -m jaxpref.runtime.supervise` on every worker
  follow   print the experiment's log until it ends
  status   print the state of the TPU and of every worker
  fetch    download the results, without checkpoints, to --results
  stop     end the experiment (SIGTERM: it saves its last step) and wait until it has
           ended; keep the TPU
  delete   delete the TPU; the contents of the bucket remain

  --local N              run N processes on this machine under the same supervisor.
                         Uses CPUs unless JAX_PLATFORMS is set, and the Python of
                         .venv or PATH unless PYTHON is set
  --name NAME            name of the TPU and of the run's folder in the bucket
  --zone ZONE            for example us-west4-a
  --project PROJECT      Google Cloud project (default: gcloud's own setting)
  --type TYPE            for example v5litepod-16, v4-32, v5p-128, v6e-8
  --node-count N         number of slices of that type (Multislice; default 1)
  --spot                 use spot capacity: cheaper, but may be preempted
  --runtime-version V    TPU software version (default: depends on the type)
  --bucket gs://B[/DIR]  mounted on every worker as `runs/`, so use `--out runs/...`.
                         `none` writes to each worker's own disk: it supports only a
                         single host and does not survive a preemption
  --git URL --commit C   clone this commit on every worker instead of copying this tree.
                         The URL must not contain a password
  --extras LIST          extras of pyproject.toml to install (default train,tpu)
  --python VERSION       Python version on the workers (default 3.12)
  --env KEY[=VALUE]      environment variable for the experiment; may be repeated.
                         Without =VALUE, it is taken from this shell: use that for
                         secrets.  Values are copied to the workers in a file that
                         only you can read, and are never printed
  --restarts N           how often the supervisor restarts after a failure (default 3)
  --hung S, --grace S,   passed to the supervisor: seconds without progress, seconds
  --steady S             between SIGTERM and SIGKILL, seconds that reset --restarts
  --recreations N        how often to recreate a preempted TPU (default 20)
  --wait-minutes N       how long to wait for the TPU (default 1440)
  --poll-seconds N       time between status checks (default 30)
  --results DIR          where fetch writes (default results/NAME)
  --delete-after         run deletes the TPU once the experiment has ended and the results
                         are downloaded with the same SHA-256 digests as on the TPU.
                         Otherwise run keeps the TPU and prints a warning
  --create-option OPT    passed to `gcloud ... create`; may be repeated
  --ssh-option OPT       passed to `gcloud ... ssh` and `scp`; may be repeated
  --dry-run              print each command without running it

With several workers, gcloud requires your SSH key in ssh-agent:
  ssh-add ~/.ssh/google_compute_engine

exit codes: 0 success; 2 invalid usage; 3 TPU refused or preempted too often; 4 TPU not
ready in time; 5 installation failed; 6 workers unreachable; 7 results not downloaded, or
not the same as on the TPU; 130 interrupted.  run and follow return the experiment's own
exit code.
HELP
}

# ---- options -------------------------------------------------------------------------

visible() { # replaces the control characters of its input, which may come from a worker
  LC_ALL=C tr '\000-\010\013\014\016-\037\177' '?' |
    LC_ALL=C sed $'s/\xc2[\x80-\x9f]/?/g; s/\xe2\x80[\x8e\x8f\xaa-\xae]/?/g; s/\xe2\x81[\xa6-\xa9]/?/g'
}
say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" | visible >&2; }
fail() { # CODE MESSAGE
  printf 'launch_tpu: error: %s\n' "$2" | visible >&2
  exit "$1"
}

COMMAND='' NAME='' ZONE='' PROJECT='' TYPE='' NODES=1 SPOT='' RUNTIME='' BUCKET=''
GIT='' COMMIT='' EXTRAS=train,tpu PYTHON_VERSION=3.12 RESTARTS=3 RECREATIONS=20
WAIT_MINUTES=1440 POLL=30 RESULTS='' DELETE_AFTER='' DRY='' LOCAL=''
ENVIRONMENT=() CREATE_OPTIONS=() SSH_OPTIONS=() SUPERVISOR=() EXPERIMENT=()

parse() {
  while (($#)); do
    local option=$1 value=''
    shift
    case $option in
      --) EXPERIMENT=("$@") && return ;;
      -h | --help | help) usage && exit 0 ;;
      --spot) SPOT=1 && continue ;;
      --dry-run) DRY=1 && continue ;;
      --delete-after) DELETE_AFTER=1 && continue ;;
      --*=*) value=${option#*=} option=${option%%=*} ;;
      --*)
        (($#)) || fail 2 "$option: expected a value"
        value=$1
        shift
        ;;
      *)
        [[ -z $COMMAND ]] || fail 2 "$option: the experiment comes after --"
        COMMAND=$option && continue
        ;;
    esac
    case $option in
      --name) NAME=$value ;;
      --zone) ZONE=$value ;;
      --project) PROJECT=$value ;;
      --type) TYPE=$value ;;
      --node-count) NODES=$value ;;
      --runtime-version) RUNTIME=$value ;;
      --bucket) BUCKET=${value%/} ;;
      --git) GIT=$value ;;
      --commit) COMMIT=$value ;;
      --extras) EXTRAS=$value ;;
      --python) PYTHON_VERSION=$value ;;
      --env) add_environment "$value" ;;
      --restarts) RESTARTS=$value ;;
      --hung | --grace | --steady) SUPERVISOR+=("$option" "$value") ;;
      --recreations) RECREATIONS=$value ;;
      --wait-minutes) WAIT_MINUTES=$value ;;
      --poll-seconds) POLL=$value ;;
      --results) RESULTS=$value ;;
      --create-option) CREATE_OPTIONS+=("$value") ;;
      --ssh-option) SSH_OPTIONS+=("$value") ;;
      --local) LOCAL=$value ;;
      *) fail 2 "$option: unknown option; see --help" ;;
    esac
  done
}

check() {
  local each
  for each in "--node-count $NODES" "--restarts $RESTARTS" "--recreations $RECREATIONS" \
    "--wait-minutes $WAIT_MINUTES" ${LOCAL:+"--local $LOCAL"}; do
    [[ $each =~ ^[^\ ]+\ (0|[1-9][0-9]{0,8})$ ]] ||
      fail 2 "$each: expected a whole number, such as 8"
  done
  local numbers=(--poll-seconds "$POLL" ${SUPERVISOR[@]+"${SUPERVISOR[@]}"})
  for ((each = 1; each < ${#numbers[@]}; each += 2)); do
    [[ ${numbers[each]} =~ ^[0-9]{1,9}(\.[0-9]{1,9})?$ ]] ||
      fail 2 "${numbers[each - 1]} ${numbers[each]}: expected a number, such as 30 or 0.5"
  done
  [[ $POLL =~ [1-9] ]] || fail 2 "--poll-seconds $POLL: must be more than 0"
  [[ $PYTHON_VERSION =~ ^3\.[0-9]{1,3}$ ]] ||
    fail 2 "--python $PYTHON_VERSION: expected a version, such as 3.12"
  ((NODES > 0)) || fail 2 "--node-count $NODES: must be at least 1"
  if [[ -n $LOCAL ]]; then
    ((LOCAL > 0)) || fail 2 "--local $LOCAL: must be at least 1"
    [[ -z $COMMAND ]] || fail 2 "$COMMAND: --local takes no command"
    ((${#EXPERIMENT[@]})) || fail 2 "no experiment given: put its command after --"
    return
  fi
  case $COMMAND in
    run | resume | create | wait | install | start | follow | status | fetch | stop | delete) ;;
    '') usage >&2 && exit 2 ;;
    *) fail 2 "$COMMAND: unknown command; see --help" ;;
  esac
  [[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail 2 "--name '$NAME': use lowercase letters, digits, and dashes; start with a letter"
  [[ -n $ZONE ]] || fail 2 "--zone is required"
  case $COMMAND in run | resume | create)
    [[ -n $TYPE ]] || fail 2 "--type is required, for example --type v5litepod-16"
    [[ -n $RUNTIME ]] || choose_runtime
    ;;
  esac
  case $COMMAND in run | resume | install | start | fetch)
    [[ $BUCKET == none || $BUCKET =~ ^gs://[^/]+ ]] ||
      fail 2 "--bucket '$BUCKET': expected gs://BUCKET[/FOLDER], or none"
    ;;
  esac
  case $COMMAND in run | resume | start)
    ((${#EXPERIMENT[@]})) || fail 2 "no experiment given: put its command after --"
    ;;
  esac
  if [[ -n $SPOT && $BUCKET == none ]]; then
    fail 2 "--spot with --bucket none: the run would be lost on preemption"
  fi
  if [[ $NODES != 1 && $BUCKET == none ]]; then
    fail 2 "--node-count $NODES with --bucket none: only the first worker is downloaded"
  fi
  [[ -n $GIT && -n $COMMIT || -z $GIT$COMMIT ]] ||
    fail 2 "--git and --commit must be given together"
  [[ ! $GIT =~ ^[a-z+]+://[^/]*:[^/]*@ && ! $GIT =~ ^https?://[^/]*@ ]] ||
    fail 2 "--git: the URL contains a password, which other users could read; remove it"
}

add_environment() { # KEY=VALUE, or KEY to take the value from this shell
  local key=${1%%=*}
  # The message leaves the value out, which may be a secret.
  [[ $key =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
    fail 2 "--env: expected KEY=VALUE, or the name of a variable in this shell"
  if [[ $1 == *=* ]]; then
    ENVIRONMENT+=("$1")
  else
    [[ -n ${!key+set} ]] || fail 2 "--env $key: not set in this shell; use --env $key=VALUE"
    ENVIRONMENT+=("$key=${!key}")
  fi
}

choose_runtime() {
  case $TYPE in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    tpu7x* | v7x*) fail 2 "--type $TYPE: TPU7x is available only through GKE" ;;
    *) fail 2 "--type $TYPE: unknown type; add --runtime-version" ;;
  esac
}

# ---- printing or running commands ----------------------------------------------------

exec 3>&1 # where --dry-run prints, even inside $(...)
exec 4>&2 # for messages where stderr is redirected

quoted() { # prints the arguments as a command line, quoted where the shell needs it
  local each line=''
  for each in "$@"; do
    if [[ ! $each =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
      each=${each//\'/\'\\\'\'}
      each="'$each'"
    fi
    line+=" $each"
  done
  printf '%s\n' "${line# }"
}

do_() {
  if [[ -n $DRY ]]; then
    quoted "$@" >&3
  else
    "$@" 3>&- 4>&-
  fi
}

tpu() { # VERB ARGUMENTS: runs a gcloud command for the queued resource
  local verb=$1
  shift
  do_ gcloud compute tpus queued-resources "$verb" "$@" --zone="$ZONE" \
    ${PROJECT:+"--project=$PROJECT"}
}

on_all() { # SCRIPT: runs it on every worker of every slice
  tpu ssh "$NAME" --node=all --worker=all --command="$1" \
    ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"}
}

on_first() { # SCRIPT: runs it on worker 0 of slice 0, whose log `follow` shows
  tpu ssh "$NAME" --node=0 --worker=0 --command="$1" \
    ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"}
}

SHA256=(sha256sum)
command -v sha256sum >/dev/null || SHA256=(shasum -a 256) # on macOS

sha256() { "${SHA256[@]}" | cut -c1-16; }

supervised() { # prints the command line that a worker runs
  quoted python -P -m jaxpref.runtime.supervise --restarts "$RESTARTS" \
    ${SUPERVISOR[@]+"${SUPERVISOR[@]}"} -- "${EXPERIMENT[@]}"
}

LOST=207 GONE=208 # internal return codes that no experiment is expected to use
PATIENCE=10       # status checks in a row that may fail

# ---- scripts that run on a worker ----------------------------------------------------
#
# ~/jaxpref on a worker holds code/, venv/, bucket/ (the mount), runs (a link to the run's
# folder in the bucket), log, pid, command, and exit (the supervisor's exit code).

remote_head() { # NAME: the common first lines of each script
  printf '# jaxpref: %s\nset -eu\nmkdir -p "$HOME/jaxpref"\ncd "$HOME/jaxpref"\n' "$1"
}

remote_install() { # CODE_DIGEST ENVIRONMENT_DIGEST ARCHIVE_DIGEST
  remote_head install
  printf 'code=%q environment=%q archive=%q python=%q extras=%q git=%q commit=%q\n' \
    "$1" "$2" "$3" "$PYTHON_VERSION" "$EXTRAS" "$GIT" "$COMMIT"
  local path=${BUCKET#gs://}
  printf 'bucket=%q folder=%q\n' "${path%%/*}" \
    "bucket/$([[ $path == */* ]] && printf '%s/' "${path#*/}")$NAME"
  cat <<'REMOTE'
if [ "$bucket" = none ]; then
  mkdir -p local
  ln -sfn local runs
elif ! mountpoint -q bucket; then
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/google-cloud.asc >/dev/null
    repository=https://packages.cloud.google.com/apt
    echo "deb [signed-by=/usr/share/keyrings/google-cloud.asc] $repository gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse >/dev/null
  fi
  mkdir -p bucket
  # Other workers write here too, so metadata must not be cached.  Finishing a checkpoint
  # renames its folder.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=1000000 \
    "$bucket" bucket >&2
fi
if [ "$bucket" != none ]; then
  mkdir -p "$folder"
  ln -sfn "$folder" runs
fi
if [ "$(cat code/.digest 2>/dev/null)" != "$code" ]; then
  rm -rf code.new
  if [ -n "$git" ]; then
    git clone --quiet "$git" code.new
    git -C code.new checkout --quiet "$commit"
  else
    if [ "$(sha256sum <"$HOME/jaxpref-code.tgz" | cut -c1-16)" != "$archive" ]; then
      echo "the code did not arrive completely; run the same command again" >&2
      exit 1
    fi
    mkdir code.new
    tar -xzf "$HOME/jaxpref-code.tgz" -C code.new
  fi
  rm -rf code
  mv code.new code
  ln -sfn ../runs code/runs
  echo "$code" >code/.digest
fi
if [ "$(cat venv/.digest 2>/dev/null)" != "$environment" ]; then
  rm -rf venv
  # Python 3.10 of Ubuntu 22.04 is too old; uv downloads a newer one.
  if ! "python$python" -m venv venv >/dev/null 2>&1; then
    rm -rf venv
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python "$python" venv
  fi
  # Pin the versions of the first installation, so that nodes created later match it.
  pins="runs/.environment-$environment.txt"
  if [ -s "$pins" ]; then set -- -c "$pins"; else set --; fi
  venv/bin/python -m pip install --quiet "$@" -e "code[$extras]" >&2
  echo "$environment" >venv/.digest
fi
packages=$(venv/bin/python -m pip freeze --exclude-editable)
if [ -z "$packages" ]; then
  echo "pip lists no packages" >&2
  exit 1
fi
echo "environment $(echo "$packages" | LC_ALL=C sort | sha256sum | cut -c1-16)"
REMOTE
}

remote_pins() { # ENVIRONMENT_DIGEST
  remote_head pins
  printf 'pins=runs/.environment-%q.txt\n' "$1"
  cat <<'REMOTE'
if [ ! -s "$pins" ]; then
  venv/bin/python -m pip freeze --exclude-editable >pins.new
  [ -s pins.new ]
  cp pins.new "$pins.new"
  mv "$pins.new" "$pins"
fi
echo stored
REMOTE
}

remote_alive() { # defines `alive`; the boot ID guards against a PID reused after a reboot
  cat <<'REMOTE'
boot=$(cat /proc/sys/kernel/random/boot_id)
alive() {
  [ ! -f exit ] && [ "$(tail -n 1 pid 2>/dev/null)" = "$boot" ] &&
    kill -0 "$(head -n 1 pid)" 2>/dev/null
}
REMOTE
}

remote_start() {
  remote_head start
  remote_alive
  printf 'bucket=%q variables=%d line=%q\n' \
    "$BUCKET" "${#ENVIRONMENT[@]}" "$(supervised)"
  cat <<'REMOTE'
trap 'rm -f "$HOME/jaxpref-environment"' EXIT
if alive; then
  echo "started $(hostname)"
  exit 0
fi
if [ ! -f code/.digest ] || [ ! -f venv/.digest ]; then
  echo "code and environment are not installed; use the install command" >&2
  exit 1
fi
if [ "$bucket" != none ] && ! mountpoint -q bucket; then
  echo "the bucket is not mounted; use the install command" >&2
  exit 1
fi
export PATH="$HOME/jaxpref/venv/bin:$PATH"
# The compilation cache is in the bucket too, so a new node need not recompile.
export JAX_COMPILATION_CACHE_DIR="$HOME/jaxpref/runs/.compiled"
if [ "$variables" != 0 ]; then
  if [ "$(tail -n 1 "$HOME/jaxpref-environment")" != "# $variables variables" ]; then
    echo "the values of --env did not arrive completely; run the same command again" >&2
    exit 1
  fi
  . "$HOME/jaxpref-environment"
fi
rm -f exit
printf '%s\n' "$line" >command
cd code
# The trap lets this shell survive a SIGTERM to the process group and record the exit code.
setsid nohup bash -c 'trap : TERM; eval "$0"; echo $? >../exit.new; mv ../exit.new ../exit' "$line" \
  >>../log 2>&1 </dev/null &
printf '%s\n%s\n' "$!" "$boot" >../pid
echo "started $(hostname)"
REMOTE
}

remote_status() { # prints one line: worker HOST running|gone|idle|exit CODE
  remote_head status
  remote_alive
  cat <<'REMOTE'
state=idle
[ ! -f pid ] || state=gone
! alive || state=running
[ ! -f exit ] || state="exit $(cat exit)"
echo "worker $(hostname) $state"
REMOTE
}

remote_results() { # prints the digest of each result, then their number
  remote_head results
  printf 'bucket=%q\n' "$BUCKET"
  cat <<'REMOTE'
# Without a bucket, the results are lost with the TPU, so all files count.  In the bucket,
# checkpoints and compiled programs remain; they are not downloaded.
if [ "$bucket" = none ]; then
  set --
else
  mountpoint -q bucket
  set -- ! -path '*/checkpoints/*' ! -path './.compiled/*'
fi
(cd runs/ && find -L . -type f "$@" -exec sha256sum {} +) >results
cat results
echo "results $(wc -l <results)"
REMOTE
}

remote_log() { # OFFSET in bytes, from which the log is printed
  remote_head log
  printf 'if [ -f log ]; then tail -c +%d log; fi\n' "$(($1 + 1))"
}

remote_stop() {
  remote_head stop
  remote_alive
  printf 'if alive; then kill -TERM -- "-$(head -n 1 pid)"; fi\n'
  printf 'echo "stopping $(hostname)"\n'
}

# ---- the steps -----------------------------------------------------------------------

state() { # prints the state of the queued resource, or ABSENT if there is none
  local found complaint=$TEMPORARY/complaint
  if found=$(tpu describe "$NAME" --format='value(state.state)' 2>"$complaint"); then
    printf '%s\n' "${found:-UNKNOWN}"
  elif grep -q 'NOT_FOUND' "$complaint"; then # not "location not found" and its like
    printf 'ABSENT\n'
  else
    tail -n 1 "$complaint" | visible >&2
    printf 'UNKNOWN\n'
  fi
}

node_names() { # prints the names of the nodes, one for each slice
  local index
  ((NODES > 1)) || printf '%s\n' "$NAME"
  for ((index = 0; NODES > 1 && index < NODES; index++)); do
    printf '%s\n' "$NAME-$index"
  done
}

nodes_ready() { # false if a node was preempted while its request is still active
  local node found
  for node in $(node_names); do
    found=$(do_ gcloud compute tpus tpu-vm describe "$node" --format='value(state)' \
      --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} 2>&1) || true
    case $found in PREEMPTED | TERMINATED | STOPPED | *NOT_FOUND*)
      say "$node: ${found##*$'\n'}"
      return 1
      ;;
    esac
  done
}

create() { # replaces a failed request; does nothing if one is active
  local now nodes=(--node-id="$NAME") unknown=0
  now=$(state)
  while [[ $now == UNKNOWN && -z $DRY ]]; do
    unknown=$((unknown + 1))
    ((unknown < PATIENCE)) || return 6
    sleep "$POLL"
    now=$(state)
  done
  case $now in
    ACTIVE | CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING)
      say "$NAME already exists ($now)"
      return 0
      ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING)
      say "$NAME is $now: recreating it"
      delete || return 3
      ;;
  esac
  ((NODES == 1)) || nodes=(--node-count="$NODES" --node-prefix="$NAME")
  tpu create "$NAME" "${nodes[@]}" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot} \
    ${CREATE_OPTIONS[@]+"${CREATE_OPTIONS[@]}"} --quiet || {
    say "$NAME: refused; see gcloud's error above"
    return 3
  }
}

await() { # 0 ready, 3 failed, 4 timed out, 6 no answer from gcloud, LOST preempted
  local now before='' unknown=0 end=$((SECONDS + WAIT_MINUTES * 60))
  while :; do
    now=$(state)
    [[ -z $DRY ]] || return 0
    [[ $now == "$before" ]] || say "$NAME: $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      SUSPENDING | SUSPENDED | DELETING) return "$LOST" ;;
      ABSENT) return 3 ;;
      FAILED)
        tpu describe "$NAME" --format='value(state.failedData.error.message)' >&2 || true
        return 3
        ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        ((unknown < PATIENCE)) || return 6
        ;;
      *) unknown=0 ;;
    esac
    if ((SECONDS >= end)); then
      say "$NAME: not ready after $WAIT_MINUTES minutes; it stays in the queue"
      return 4
    fi
    sleep "$POLL"
  done
}

PACKED=(pyproject.toml README.md LICENSE jaxpref experiments benchmarks)

digest_of_code() {
  if [[ -n $GIT ]]; then
    printf '%s %s' "$GIT" "$COMMIT" | sha256
  else
    (cd "$HERE" && find "${PACKED[@]}" -type f ! -path '*/__pycache__/*' \
      -exec "${SHA256[@]}" {} + | LC_ALL=C sort -k2 | sha256)
  fi
}

digest_of_environment() { # a cloned commit has its own pyproject.toml
  { if [[ -n $GIT ]]; then echo "$GIT $COMMIT"; else cat "$HERE/pyproject.toml"; fi &&
    echo "$EXTRAS $PYTHON_VERSION"; } | sha256
}

install() {
  local code environment archive='' script found try packed=$TEMPORARY/jaxpref-code.tgz
  code=$(digest_of_code) && environment=$(digest_of_environment) || return 5
  count_workers || return
  if [[ $BUCKET == none && $NUM_WORKERS != 1 ]]; then
    say "$NAME has $NUM_WORKERS workers, but --bucket none supports only one: use a bucket"
    return 5
  fi
  if [[ -z $GIT ]]; then
    do_ tar -czf "$packed" -C "$HERE" --exclude=__pycache__ "${PACKED[@]}" || return 5
    [[ -n $DRY ]] || archive=$(sha256 <"$packed") || return 5
    copy_to_all "$packed" || return 5
  fi
  script=$(remote_install "$code" "$environment" "$archive") || return 5
  for try in 1 2; do # the second try does nothing on workers that succeeded
    if found=$(on_all "$script"); then break; fi
    say "installation failed on a worker (attempt $try of 2)"
    ((try == 1)) || return 5
  done
  [[ -z $DRY ]] || found='environment 0'
  if (($(grep '^environment ' <<<"$found" | sort -u | wc -l) != 1)); then
    say "workers have different environments: $(sort <<<"$found" | uniq -c | xargs)"
    return 5
  fi
  all_answered environment "$found" || return 5
  found=$(on_first "$(remote_pins "$environment")") || return 5
  [[ -n $DRY || $found == *stored* ]] || {
    say "the package versions could not be stored: no answer from the first worker"
    return 5
  }
  [[ -n $DRY ]] || say "installed on $NUM_WORKERS worker(s)"
}

copy_to_all() { # FILE: copies it into the home folder on every worker
  tpu scp "$1" "$NAME:" --node=all --worker=all ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"}
}

send_environment() { # copies the values of --env, readable only by their owner
  # Never as arguments, because every user of a machine can read those.
  local each file=$TEMPORARY/jaxpref-environment
  ((${#ENVIRONMENT[@]})) || return 0
  if [[ -n $DRY ]]; then
    masked_environment
  else
    (
      umask 077
      for each in "${ENVIRONMENT[@]}"; do
        printf 'export %s=%q\n' "${each%%=*}" "${each#*=}"
      done >"$file" && printf '# %d variables\n' "${#ENVIRONMENT[@]}" >>"$file"
    ) || return 1
  fi
  copy_to_all "$file" || return 1
  rm -f "$file"
}

masked_environment() { # prints the names of the variables as comments
  local each
  for each in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    printf '# %s=*** is in a file with mode 600\n' "${each%%=*}" >&3
  done
}

start() {
  local found
  ((NUM_WORKERS)) || count_workers || return
  send_environment || return 6
  found=$(on_all "$(remote_start)") || return 6
  running
  all_answered started "$found" || return 6
  [[ -n $DRY ]] || say "started"
}

stop() { # succeeds once no worker is running
  local found tries
  ((NUM_WORKERS)) || count_workers || return
  found=$(on_all "$(remote_stop)") || return 6
  all_answered stopping "$found" || return 6
  [[ -z $DRY ]] || return 0
  for ((tries = 0; tries < PATIENCE; tries++)); do
    found=$(statuses) || found=''
    if [[ -n $found ]] && ! grep -q ' running$' <<<"$found"; then
      say "stopped: $(xargs <<<"$found")"
      return 0
    fi
    sleep "$POLL"
  done
  say "not stopped after $PATIENCE checks: ${found:-no response from the workers}"
  return 6
}

REPEAT="the same command continues"
running() { INTERRUPTED="the experiment keeps running, and run reattaches to it"; }

NUM_WORKERS=0 # workers of all slices; 0: not counted yet

count_workers() { # asks gcloud, because its ssh skips a node that it cannot reach
  local names node found count=0
  names=$(tpu describe "$NAME" --flatten='tpu.nodeSpec[]' \
    --format='value(tpu.nodeSpec.nodeId)') || return 6
  for node in ${names:-$(node_names)}; do
    found=$(do_ gcloud compute tpus tpu-vm describe "$node" \
      --flatten='networkEndpoints[]' --format='value(networkEndpoints.ipAddress)' \
      --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}) || return 6
    count=$((count + $(grep -c . <<<"$found")))
  done
  NUM_WORKERS=$count
  [[ -z $DRY ]] || NUM_WORKERS=1
  if ((NUM_WORKERS == 0)); then
    say "$NAME: gcloud lists no workers; run the same command again once it is ready"
    return 6
  fi
}

all_answered() { # WORD OUTPUT: true if every worker printed a line that begins with WORD
  local count
  count=$(grep -c "^$1 " <<<"$2")
  [[ -z $DRY ]] || return 0
  ((count >= NUM_WORKERS)) || {
    say "only $count of $NUM_WORKERS workers answered; run the same command again"
    return 1
  }
}

statuses() { # prints a line for every worker; false if one is missing
  local found
  found=$(on_all "$(remote_status)" 2>/dev/null | grep '^worker ') || return 1
  ((NUM_WORKERS)) || return 1
  (($(grep -c . <<<"$found") >= NUM_WORKERS)) || return 1
  printf '%s\n' "$found"
}

KNOWN=0 # number of bytes of the log already shown

show_log() {
  local text=$TEMPORARY/log
  if on_first "$(remote_log "$KNOWN")" >"$text" 2>/dev/null; then
    # Leaves out the rest of a character that began in the last part of the log.
    LC_ALL=C sed $'1s/^[\x80-\xbf]*//' <"$text" | visible
    KNOWN=$((KNOWN + $(wc -c <"$text")))
  fi
}

follow() { # 0 ended (exit code in ENDED), 6 unreachable, LOST preempted, GONE not running
  local silent=0 interrupted=0 found now
  while :; do
    now=$(state)
    if [[ -z $DRY && $now != ACTIVE && $now != UNKNOWN ]]; then
      say "$NAME: $now"
      return "$LOST"
    fi
    show_log
    ((NUM_WORKERS)) || [[ -n $DRY ]] || count_workers || true
    found=$(statuses) || found=''
    [[ -z $DRY ]] || return 0
    if [[ -z $found ]]; then
      nodes_ready || return "$LOST"
      silent=$((silent + 1))
      say "no response from the workers ($silent of $PATIENCE)"
      ((silent < PATIENCE)) || return 6
    elif ended "$found"; then
      show_log
      # A preemption ends the experiment (130, or 143 if it was training) before the
      # state of the TPU changes.
      interrupted=$((interrupted + 1))
      if ((ENDED != 130 && ENDED != 143 || interrupted == PATIENCE)); then
        say "ended with code $ENDED: $(xargs <<<"$found")"
        ((ENDED == 0)) || on_all "$(remote_stop)" 2>/dev/null || true
        return 0
      fi
      ((interrupted > 1)) || say "interrupted; checking whether this is a preemption"
    elif grep -Eq ' (gone|idle)$' <<<"$found"; then
      say "not running: $(xargs <<<"$found")"
      return "$GONE"
    else
      silent=0 interrupted=0
    fi
    sleep "$POLL"
  done
}

ENDED=0

ended() { # STATUSES: true if all workers succeeded or any failed; sets ENDED
  # A code that is not a number, for example because the disk was full, is a failure.
  ENDED=$(sed -n 's/.* exit //p' <<<"$1" | sed 's/^$/1/; s/.*[^0-9].*/1/' | sort -n |
    grep -vx 0 | head -n 1) || true
  [[ -z $ENDED ]] || return 0
  ENDED=0
  ! grep -qv ' exit 0$' <<<"$1"
}

fetch() { # 7 if a result was not downloaded, or is not the same as on the TPU
  local to=${RESULTS:-results/$NAME}
  do_ mkdir -p "$to" || return 7
  if [[ $BUCKET == none ]]; then
    tpu scp "$NAME:jaxpref/local" "$to" --recurse --node=0 --worker=0 \
      ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"} || return 7
    verify "$to/local" || return 7
  else
    do_ gcloud storage rsync "$BUCKET/$NAME" "$to" --recursive \
      '--exclude=(.*/)?checkpoints/.*|\.compiled/.*' ${PROJECT:+"--project=$PROJECT"} ||
      return 7
    [[ -z $DELETE_AFTER ]] || verify "$to" || return 7
  fi
  [[ -n $DRY ]] || say "results: $to"
}

verify() { # FOLDER: true if it holds every result of the TPU with the same SHA-256 digest
  local there=$TEMPORARY/there here=$TEMPORARY/here missing count
  on_first "$(remote_results)" >"$there" || {
    say "the digests of the results could not be read on the TPU"
    return 1
  }
  [[ -z $DRY ]] || return 0
  count=$(sed -n '$s/^results \([0-9][0-9]*\)$/\1/p' "$there")
  sed '$d' "$there" | LC_ALL=C sort >"$there.sorted" || return 1
  if [[ -z $count || $count != "$(grep -c . "$there.sorted")" ]]; then
    say "the digests of the results did not arrive completely"
    return 1
  fi
  if ! grep -Eqv '  \./\.(environment-|compiled/)' "$there.sorted"; then
    say "there are no results; did the experiment write to runs/ (--out runs/...)?"
    return 1
  fi
  (cd "$1" && find . -type f -exec "${SHA256[@]}" {} +) | LC_ALL=C sort >"$here" ||
    return 1
  missing=$(LC_ALL=C comm -23 "$there.sorted" "$here") || return 1
  if [[ -n $missing ]]; then
    say "$(grep -c . <<<"$missing") of $count results are missing or differ in $1:" \
      "$(head -n 3 <<<"$missing" | cut -c67- | tr '\n' ' ')"
    return 1
  fi
  say "the digests of all $count results are the same on the TPU and in $1"
}

delete() { # succeeds once gcloud says that there is no TPU
  local now tries end=$((SECONDS + WAIT_MINUTES * 60))
  now=$(state)
  while [[ $now == SUSPENDING || $now == DELETING ]] && ((SECONDS < end)); do
    sleep "$POLL"
    now=$(state)
  done
  if [[ $now == ABSENT ]]; then
    say "$NAME: nothing to delete"
    return 0
  fi
  tpu delete "$NAME" --force --quiet || return
  for ((tries = 0; tries < PATIENCE; tries++)); do
    now=$(state)
    [[ -z $DRY && $now != ABSENT ]] || return 0
    sleep "$POLL"
  done
  say "$NAME is still $now after it was deleted"
  return 3
}

run() { # returns the experiment's exit code; warns about a TPU that still exists
  local code=0
  attempt || code=$?
  if [[ -z $DRY && -n $EXISTS ]]; then
    say "$NAME still exists and costs money: $0 delete --name $NAME --zone $ZONE"
  fi
  return "$code"
}

EXISTS='' # nonempty if the TPU exists, as far as is known

attempt() { # all steps, repeated after each preemption
  local code recreations=0
  while :; do
    create || {
      code=$? # the request may have been accepted anyway
      [[ -n $DRY || $(state) == ABSENT ]] || EXISTS=1
      return "$code"
    }
    EXISTS=1
    code=0
    await || code=$?
    ((code)) || once || code=$?
    if ((code == 5 || code == 6)); then # did it fail because the TPU is gone?
      case $(state) in SUSPENDING | SUSPENDED | DELETING | ABSENT) code=$LOST ;; esac
    fi
    case $code in
      0) break ;;
      "$LOST" | "$GONE") ;;
      *) return "$code" ;;
    esac
    recreations=$((recreations + 1))
    if ((recreations > RECREATIONS)); then
      say "$NAME: lost $recreations times, more than --recreations $RECREATIONS allows"
      return 3
    fi
    if ((code == LOST)) && [[ $BUCKET == none ]]; then
      say "$NAME was lost.  A disk that still exists may hold the only copy of the results:"
      say "try the fetch command, then use the delete command and start again"
      return 3
    fi
    if ((code == LOST)); then # the request may outlive its nodes: delete it first
      delete || return 3
      EXISTS=''
      KNOWN=0
      NUM_WORKERS=0
    fi
    say "resuming ($recreations of at most $RECREATIONS)"
  done
  INTERRUPTED=$REPEAT
  if ! fetch; then
    say "the results were not downloaded completely; use the fetch command to try again"
    ((ENDED)) || ENDED=7
    return "$ENDED" # without deleting the TPU, which may hold the only copy
  fi
  if [[ -n $DELETE_AFTER ]]; then
    delete || return 3
    EXISTS=''
  fi
  return "$ENDED"
}

once() { # installs, starts, and follows; only follows if it is already running
  local found='' other
  [[ -n $DRY ]] || { count_workers && found=$(statuses); } || true
  if [[ -n $found ]] && ! grep -qv ' running$' <<<"$found"; then
    other=$(on_first 'cat jaxpref/command' 2>/dev/null) || other=''
    [[ -n $other ]] || return 6
    if [[ $other != "$(supervised)" ]]; then
      say "$NAME is running another experiment; stop it first: $other"
      return 2
    fi
    running
    say "already running"
  else
    install || return
    start || return
  fi
  follow
}

local_() {
  local python=python3 run=exec each # exec, so that signals reach the supervisor
  [[ ! -x $HERE/.venv/bin/python ]] || python=$HERE/.venv/bin/python
  python=${PYTHON:-$python}
  if [[ -n $DRY ]]; then
    run=do_
    masked_environment
  fi
  for each in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    export "${each?}"
  done
  PATH="$(dirname "$(command -v "$python")"):$PATH"
  export PATH PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
  "$run" env JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" "$python" -P \
    -m jaxpref.runtime.supervise --restarts "$RESTARTS" \
    ${SUPERVISOR[@]+"${SUPERVISOR[@]}"} --processes "$LOCAL" -- "${EXPERIMENT[@]}"
}

# ---- main ----------------------------------------------------------------------------

parse "$@"
check
if [[ -n $LOCAL ]]; then
  local_
  exit
fi
[[ -n $DRY ]] || command -v gcloud >/dev/null || fail 2 "gcloud is not installed"
TEMPORARY=$(mktemp -d) # only this user can read it
trap 'rm -rf "$TEMPORARY"' EXIT
INTERRUPTED=$REPEAT
trap 'say "interrupted; $INTERRUPTED" 2>&4; exit 130' INT TERM
code=0
case $COMMAND in
  run | resume) run || code=$? ;;
  create) create || code=$? ;;
  wait) await || code=$? ;;
  install) install || code=$? ;;
  start) start || code=$? ;;
  follow)
    running
    follow || code=$?
    ((code)) || code=$ENDED
    ;;
  status) { state && on_all "$(remote_status)" | visible; } || code=$? ;;
  fetch) fetch || code=$? ;;
  stop) stop || code=$? ;;
  delete) delete || code=$? ;;
esac
if ((code == LOST || code == GONE)); then
  say "$NAME was lost; the run command recreates it and resumes"
  code=3
fi
exit "$code"
