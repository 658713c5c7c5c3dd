#!/usr/bin/env bash
# Starts an experiment on a Cloud TPU, brings it back after a preemption, fetches what it
# wrote: `./launch_tpu.sh --help`.  Pages: docs/pods.md.
#
# The order of this file: help, what was asked, commands shown or run, what runs on a
# worker, one function for each step, the run that joins them.
#
# Google Cloud SDK 528 parses every gcloud command below (a test asks it to), states are
# those of its API, runtime versions those of cloud.google.com/tpu/docs/runtimes.  What the
# commands do was only played by a stub; no real TPU has seen this script yet.
# shellcheck disable=SC2016 # much of what stands in single quotes is for the workers
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'HELP'
usage: ./launch_tpu.sh COMMAND --name NAME --zone ZONE [options] [-- EXPERIMENT...]
       ./launch_tpu.sh --local N [--restarts N] [--dry-run] -- EXPERIMENT...

  run      all of it: create, wait, install, start, follow, again after a
           preemption, fetch.  The same command again goes on where it was
  resume   the same as run
  create   ask for the TPU (a queued resource), if it is not there already
  wait     until it is ready; one line a change
  install  code and environment on every worker; nothing where they are the same
  start    EXPERIMENT under `python -m jaxpref.runtime.supervise` on every worker
  follow   its log and its end
  status   of the TPU and of every worker
  fetch    what it wrote, without checkpoints, to --results
  stop     end the experiment (SIGTERM: it saves its last step), keep the TPU
  delete   delete the TPU; what is in the bucket stays

  --local N              N processes on this machine, the same supervisor; on CPUs
                         unless JAX_PLATFORMS says otherwise, with the Python of .venv
                         or of PATH unless PYTHON names another
  --name NAME            of the TPU; the run's folder in the bucket has it too
  --zone ZONE            for example us-west4-a
  --project PROJECT      where gcloud's own setting is not the one
  --type TYPE            for example v5litepod-16, v4-32, v5p-128, v6e-8
  --node-count N         slices of that type (Multislice; default 1)
  --spot                 cheaper, may be preempted
  --runtime-version V    chosen by the type where not given
  --bucket gs://B[/DIR]  the folder `runs/` of the experiment, mounted on every worker,
                         so write `--out runs/...`; `none` keeps it on each worker, which
                         only does for one host and survives no preemption
  --git URL --commit C   clone this on every worker, in place of copying this tree
  --extras LIST          of pyproject.toml (default train,tpu)
  --python VERSION       on the workers (default 3.12)
  --env KEY=VALUE        for the experiment; may be repeated
  --restarts N           by the supervisor, of processes that died (default 3)
  --hung S, --grace S,   the supervisor's: seconds without progress, from SIGTERM to
  --steady S             SIGKILL, that renew its restarts (its defaults)
  --recreations N        of a TPU that was preempted (default 20)
  --wait-minutes N       for the TPU (default 1440)
  --poll-seconds N       between looks (default 30)
  --results DIR          for fetch (default results/NAME)
  --delete-after         run deletes the TPU once the experiment has ended; if it could
                         not be installed or followed the TPU is left, and told of
  --create-option OPT    passed on to `gcloud ... create`; may be repeated
  --ssh-option OPT       passed on to `gcloud ... ssh` and `scp`; may be repeated
  --dry-run              print each command, run none

With several workers gcloud asks for your key in ssh-agent:
  ssh-add ~/.ssh/google_compute_engine

exit codes: 0 done; 2 wrong use; 3 the TPU was refused, or preempted too often; 4 not ready
in time; 5 not installed; 6 workers cannot be reached; 130 interrupted (the experiment goes
on); run and follow: the experiment's own.
HELP
}

# ---- what was asked ------------------------------------------------------------------

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
fail() { # CODE MESSAGE
  printf 'launch_tpu: error: %s\n' "$2" >&2
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
        (($#)) || fail 2 "$option: a value must follow"
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
      --env) ENVIRONMENT+=("$value") ;;
      --restarts) RESTARTS=$value ;;
      --hung | --grace | --steady) SUPERVISOR+=("$option" "$value") ;;
      --recreations) RECREATIONS=$value ;;
      --wait-minutes) WAIT_MINUTES=$value ;;
      --poll-seconds) POLL=$value ;;
      --results) RESULTS=$value ;;
      --create-option) CREATE_OPTIONS+=("$value") ;;
      --ssh-option) SSH_OPTIONS+=("$value") ;;
      --local) LOCAL=$value ;;
      *) fail 2 "$option: no such option; see --help" ;;
    esac
  done
}

check() {
  local each
  for each in "--node-count $NODES" "--restarts $RESTARTS" "--recreations $RECREATIONS" \
    "--wait-minutes $WAIT_MINUTES" ${LOCAL:+"--local $LOCAL"}; do
    [[ $each =~ \ [0-9]+$ ]] || fail 2 "$each: expected a whole number"
  done
  ((NODES > 0)) || fail 2 "--node-count $NODES: at least 1"
  if [[ -n $LOCAL ]]; then
    ((LOCAL > 0)) || fail 2 "--local $LOCAL: at least 1"
    [[ -z $COMMAND ]] || fail 2 "$COMMAND: --local takes no command"
    ((${#EXPERIMENT[@]})) || fail 2 "no experiment: put it after --"
    return
  fi
  case $COMMAND in
    run | resume | create | wait | install | start | follow | status | fetch | stop | delete) ;;
    '') usage >&2 && exit 2 ;;
    *) fail 2 "$COMMAND: no such command; see --help" ;;
  esac
  [[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail 2 "--name '$NAME': lower-case letters, digits and dashes, a letter first"
  [[ -n $ZONE ]] || fail 2 "--zone is missing"
  case $COMMAND in run | resume | create)
    [[ -n $TYPE ]] || fail 2 "--type is missing, for example --type v5litepod-16"
    [[ -n $RUNTIME ]] || choose_runtime
    ;;
  esac
  case $COMMAND in run | resume | install | start | fetch)
    [[ $BUCKET == none || $BUCKET =~ ^gs://[^/]+ ]] ||
      fail 2 "--bucket '$BUCKET': expected gs://BUCKET[/FOLDER], or none"
    ;;
  esac
  case $COMMAND in run | resume | start)
    ((${#EXPERIMENT[@]})) || fail 2 "no experiment: put it after --"
    ;;
  esac
  if [[ -n $SPOT && $BUCKET == none ]]; then
    fail 2 "--spot with --bucket none: a preemption would lose the run"
  fi
  [[ -n $GIT && -n $COMMIT || -z $GIT$COMMIT ]] ||
    fail 2 "--git and --commit go together"
  for each in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    [[ $each =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail 2 "--env $each: expected KEY=VALUE"
  done
}

choose_runtime() {
  case $TYPE in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    tpu7x* | v7x*) fail 2 "--type $TYPE: TPU7x is only to be had through GKE" ;;
    *) fail 2 "--type $TYPE: not known here; add --runtime-version" ;;
  esac
}

# ---- commands, shown or run ----------------------------------------------------------

exec 3>&1 # what --dry-run prints, also from inside $(...)
exec 4>&2 # for a message where stderr is turned away

quoted() { # each argument as the shell would read it; only then is it shown in quotes
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

tpu() { # VERB ARGUMENTS: gcloud on the queued resource, in its zone
  local verb=$1
  shift
  do_ gcloud compute tpus queued-resources "$verb" "$@" --zone="$ZONE" \
    ${PROJECT:+"--project=$PROJECT"}
}

on_all() { # SCRIPT: on every worker of every slice
  tpu ssh "$NAME" --node=all --worker=all --command="$1" \
    ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"}
}

on_first() { # SCRIPT: on the worker that writes logs
  tpu ssh "$NAME" --node=0 --worker=0 --command="$1" \
    ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"}
}

sha256() {
  if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -c1-16
}

supervised() { # the line that a worker runs
  quoted python -m jaxpref.runtime.supervise --restarts "$RESTARTS" \
    ${SUPERVISOR[@]+"${SUPERVISOR[@]}"} -- "${EXPERIMENT[@]}"
}

LOST=207 GONE=208 # between functions; no experiment is expected to end so
PATIENCE=10       # looks in a row without an answer

# ---- what runs on a worker -----------------------------------------------------------
#
# ~/jaxpref there: code/, venv/, bucket/ (the mount), runs (what --out means: a folder of
# the bucket), log, pid, exit (the code, once the supervisor has ended), command.

remote_head() { # a name for the log, and where all of it lies
  printf '# jaxpref: %s\nset -eu\nmkdir -p "$HOME/jaxpref"\ncd "$HOME/jaxpref"\n' "$1"
}

remote_install() { # CODE_DIGEST ENVIRONMENT_DIGEST
  remote_head install
  printf 'code=%q environment=%q python=%q extras=%q git=%q commit=%q\n' \
    "$1" "$2" "$PYTHON_VERSION" "$EXTRAS" "$GIT" "$COMMIT"
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
  # Other workers write here too, so nothing that was looked up may be remembered; and a
  # checkpoint is finished by renaming its folder.
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
  # Ubuntu 22.04 brings Python 3.10, which is too old; uv fetches another.
  if ! "python$python" -m venv venv >/dev/null 2>&1; then
    rm -rf venv
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python "$python" venv
  fi
  # Versions of the first installation, so that a node made later has the same.
  pins="runs/.environment-$environment.txt"
  if [ -s "$pins" ]; then set -- -c "$pins"; else set --; fi
  venv/bin/python -m pip install --quiet "$@" -e "code[$extras]" >&2
  echo "$environment" >venv/.digest
fi
echo "environment $(venv/bin/python -m pip freeze --exclude-editable | sort | sha256sum | cut -c1-16)"
REMOTE
}

remote_pins() { # ENVIRONMENT_DIGEST
  remote_head pins
  printf 'pins=runs/.environment-%q.txt\n' "$1"
  cat <<'REMOTE'
if [ ! -s "$pins" ]; then
  venv/bin/python -m pip freeze --exclude-editable >pins.new
  cp pins.new "$pins"
fi
REMOTE
}

remote_alive() { # defines `alive`: a reboot ends it even if its number is in use again
  cat <<'REMOTE'
boot=$(cat /proc/sys/kernel/random/boot_id)
alive() {
  [ ! -f exit ] && [ "$(tail -n 1 pid 2>/dev/null)" = "$boot" ] &&
    kill -0 "$(head -n 1 pid)" 2>/dev/null
}
REMOTE
}

remote_start() {
  local each
  remote_head start
  remote_alive
  printf 'if alive; then exit 0; fi\n'
  printf 'export PATH="$HOME/jaxpref/venv/bin:$PATH"\n'
  # What is compiled is in the bucket too: a new node need not compile it again.
  printf 'export JAX_COMPILATION_CACHE_DIR="$HOME/jaxpref/runs/.compiled"\n'
  for each in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    printf 'export %s=%q\n' "${each%%=*}" "${each#*=}"
  done
  printf 'line=%q\n' "$(supervised)"
  cat <<'REMOTE'
rm -f exit
printf '%s\n' "$line" >command
cd code
# The trap lets the shell outlive a SIGTERM to all, to write down how it ended.
setsid nohup bash -c 'trap : TERM; eval "$0"; echo $? >../exit.new; mv ../exit.new ../exit' "$line" \
  >>../log 2>&1 </dev/null &
printf '%s\n%s\n' "$!" "$boot" >../pid
REMOTE
}

remote_status() { # one line: worker HOST running|gone|idle|exit CODE
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

remote_log() { # BYTES that are known already
  remote_head log
  printf 'if [ -f log ]; then tail -c +%d log; fi\n' "$(($1 + 1))"
}

remote_stop() {
  remote_head stop
  remote_alive
  printf 'if alive; then kill -TERM -- "-$(head -n 1 pid)"; fi\n'
}

# ---- the steps -----------------------------------------------------------------------

state() { # of the queued resource; ABSENT where there is none
  local found complaint
  complaint=$(mktemp)
  if found=$(tpu describe "$NAME" --format='value(state.state)' 2>"$complaint"); then
    printf '%s\n' "${found:-UNKNOWN}"
  elif grep -qi 'not.\?found' "$complaint"; then
    printf 'ABSENT\n'
  else
    tail -n 1 "$complaint" >&2
    printf 'UNKNOWN\n'
  fi
  rm -f "$complaint"
}

nodes_ready() { # false if a node was preempted though its request still stands
  local index found names=("$NAME")
  if ((NODES > 1)); then
    names=()
    for ((index = 0; index < NODES; index++)); do names+=("$NAME-$index"); done
  fi
  for index in "${names[@]}"; do
    found=$(do_ gcloud compute tpus tpu-vm describe "$index" --format='value(state)' \
      --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} 2>&1) || true
    case $found in PREEMPTED | TERMINATED | STOPPED | *[Nn][Oo][Tt]?[Ff][Oo][Uu][Nn][Dd]*)
      say "$index: ${found##*$'\n'}"
      return 1
      ;;
    esac
  done
}

create() { # nothing where a request stands; a dead one is replaced
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
      say "$NAME is there already ($now)"
      return 0
      ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING)
      say "$NAME is $now: making it anew"
      delete || return 3
      ;;
  esac
  ((NODES == 1)) || nodes=(--node-count="$NODES" --node-prefix="$NAME")
  tpu create "$NAME" "${nodes[@]}" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot} \
    ${CREATE_OPTIONS[@]+"${CREATE_OPTIONS[@]}"} --quiet || {
    say "$NAME: refused; what gcloud said stands above"
    return 3
  }
}

await() { # 0 ready, 3 failed, 4 too late, 6 gcloud does not answer, LOST preempted
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
      say "$NAME: not ready after $WAIT_MINUTES minutes; it keeps its place in the queue"
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
    (cd "$HERE" && find "${PACKED[@]}" -type f ! -path '*/__pycache__/*' -exec cksum {} + |
      LC_ALL=C sort -k3 | sha256)
  fi
}

digest_of_environment() { # code of a commit brings its own pyproject.toml
  { if [[ -n $GIT ]]; then echo "$GIT $COMMIT"; else cat "$HERE/pyproject.toml"; fi &&
    echo "$EXTRAS $PYTHON_VERSION"; } | sha256
}

install() {
  local code environment script found try
  code=$(digest_of_code) && environment=$(digest_of_environment) || return 5
  script=$(remote_install "$code" "$environment")
  if [[ -z $GIT ]]; then
    local packed
    packed=$(mktemp -d)
    do_ tar -czf "$packed/jaxpref-code.tgz" -C "$HERE" --exclude=__pycache__ \
      "${PACKED[@]}" || return 5
    tpu scp "$packed/jaxpref-code.tgz" "$NAME:" --node=all --worker=all \
      ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"} || {
      rm -rf "$packed"
      return 5
    }
    rm -rf "$packed"
  fi
  for try in 1 2; do # a worker that has finished has nothing to do the second time
    if found=$(on_all "$script"); then break; fi
    say "installation failed on a worker (try $try of 2)"
    ((try == 1)) || return 5
  done
  [[ -z $DRY ]] || found='environment 0'
  if (($(grep '^environment ' <<<"$found" | sort -u | wc -l) != 1)); then
    say "workers have different environments: $(sort <<<"$found" | uniq -c | xargs)"
    return 5
  fi
  on_first "$(remote_pins "$environment")" || return 5
  [[ -n $DRY ]] || say "installed on $(grep -c '^environment ' <<<"$found") worker(s)"
}

start() {
  on_all "$(remote_start)" || return 6
  [[ -n $DRY ]] || say "started"
}

statuses() { on_all "$(remote_status)" 2>/dev/null | grep '^worker '; }

KNOWN=0 # bytes of the log that were shown

show_log() {
  local text
  text=$(mktemp)
  if on_first "$(remote_log "$KNOWN")" >"$text" 2>/dev/null; then
    cat "$text"
    KNOWN=$((KNOWN + $(wc -c <"$text")))
  fi
  rm -f "$text"
}

follow() { # 0 ended (its code is in ENDED), 6 no answer, LOST preempted, GONE not running
  local silent=0 interrupted=0 found now
  while :; do
    now=$(state)
    if [[ -z $DRY && $now != ACTIVE && $now != UNKNOWN ]]; then
      say "$NAME: $now"
      return "$LOST"
    fi
    show_log
    found=$(statuses) || found=''
    [[ -z $DRY ]] || return 0
    if [[ -z $found ]]; then
      nodes_ready || return "$LOST"
      silent=$((silent + 1))
      say "no answer from the workers ($silent of $PATIENCE)"
      ((silent < PATIENCE)) || return 6
    elif ended "$found"; then
      show_log
      # A preemption ends the experiment (130, or 143 where it was training) before
      # anything else tells of it.
      interrupted=$((interrupted + 1))
      if ((ENDED != 130 && ENDED != 143 || interrupted == PATIENCE)); then
        say "ended with code $ENDED: $(xargs <<<"$found")"
        ((ENDED == 0)) || on_all "$(remote_stop)" 2>/dev/null || true
        return 0
      fi
      ((interrupted > 1)) || say "interrupted; waiting for whether this is a preemption"
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

ended() { # STATUSES: true if all ended well, or one did not; sets ENDED
  ENDED=$(sed -n 's/.* exit //p' <<<"$1" | sort -n | grep -vx 0 | head -n 1) || true
  [[ -z $ENDED ]] || return 0
  ENDED=0
  ! grep -qv ' exit 0$' <<<"$1"
}

fetch() {
  local to=${RESULTS:-results/$NAME}
  do_ mkdir -p "$to"
  if [[ $BUCKET == none ]]; then
    tpu scp "$NAME:jaxpref/local" "$to" --recurse --node=0 --worker=0 \
      ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"}
  else
    do_ gcloud storage rsync "$BUCKET/$NAME" "$to" --recursive \
      '--exclude=(.*/)?checkpoints/.*|\.compiled/.*' ${PROJECT:+"--project=$PROJECT"}
  fi
  [[ -n $DRY ]] || say "results: $to"
}

delete() {
  local now end=$((SECONDS + WAIT_MINUTES * 60))
  now=$(state)
  while [[ $now == SUSPENDING || $now == DELETING ]] && ((SECONDS < end)); do
    sleep "$POLL"
    now=$(state)
  done
  if [[ $now == ABSENT ]]; then
    say "$NAME: nothing to delete"
  else
    tpu delete "$NAME" --force --quiet
  fi
}

run() { # what the experiment ended with; a TPU that is left behind is told of
  local code=0
  attempt || code=$?
  if [[ -z $DRY && -n $MADE ]]; then
    say "$NAME still exists and costs money: $0 delete --name $NAME --zone $ZONE"
  fi
  return "$code"
}

MADE='' # whether there is a TPU, as far as is known

attempt() {
  local code recreations=0
  while :; do
    create || return
    MADE=1
    code=0
    await || code=$?
    ((code)) || once || code=$?
    if ((code == 5 || code == 6)); then # was it the TPU that went away?
      case $(state) in SUSPENDING | SUSPENDED | DELETING | ABSENT) code=$LOST ;; esac
    fi
    case $code in
      0) break ;;
      "$LOST" | "$GONE") ;;
      *) return "$code" ;;
    esac
    recreations=$((recreations + 1))
    if ((recreations > RECREATIONS)); then
      say "$NAME: lost $recreations times, which is more than --recreations"
      return 3
    fi
    if ((code == LOST)); then # also where the request outlives its nodes
      delete || return 3
      MADE=''
      KNOWN=0
    fi
    say "resuming ($recreations of at most $RECREATIONS)"
  done
  if ! fetch; then
    say "the results could not be fetched; fetch tries again"
    [[ $BUCKET != none ]] || DELETE_AFTER='' # they are nowhere else
  fi
  if [[ -n $DELETE_AFTER ]]; then
    delete || return 3
    MADE=''
  fi
  return "$ENDED"
}

once() { # install, start, follow; where it is running already, only follow
  local found='' other
  [[ -n $DRY ]] || found=$(statuses) || true
  if [[ -n $found ]] && ! grep -qv ' running$' <<<"$found"; then
    other=$(on_first 'cat jaxpref/command' 2>/dev/null) || other=''
    if [[ $other != "$(supervised)" ]]; then
      say "$NAME runs another experiment, stop it first: $other"
      return 2
    fi
    say "it is running already"
  else
    install || return
    start || return
  fi
  follow
}

local_() {
  local python=python3 run=exec # so that signals reach the supervisor
  [[ ! -x $HERE/.venv/bin/python ]] || python=$HERE/.venv/bin/python
  python=${PYTHON:-$python}
  [[ -z $DRY ]] || run=do_
  PATH="$(dirname "$(command -v "$python")"):$PATH"
  export PATH PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
  "$run" env JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" "$python" -m jaxpref.runtime.supervise \
    --restarts "$RESTARTS" ${SUPERVISOR[@]+"${SUPERVISOR[@]}"} --processes "$LOCAL" \
    -- "${EXPERIMENT[@]}"
}

# ---- go ------------------------------------------------------------------------------

parse "$@"
check
if [[ -n $LOCAL ]]; then
  local_
  exit
fi
[[ -n $DRY ]] || command -v gcloud >/dev/null || fail 2 "gcloud is not installed"
trap 'say "interrupted; the TPU and the experiment go on, run attaches again" 2>&4; exit 130' INT TERM
code=0
case $COMMAND in
  run | resume) run || code=$? ;;
  create) create || code=$? ;;
  wait) await || code=$? ;;
  install) install || code=$? ;;
  start) start || code=$? ;;
  follow)
    follow || code=$?
    ((code)) || code=$ENDED
    ;;
  status) { state && on_all "$(remote_status)"; } || code=$? ;;
  fetch) fetch || code=$? ;;
  stop) on_all "$(remote_stop)" || code=$? ;;
  delete) delete || code=$? ;;
esac
if ((code == LOST || code == GONE)); then
  say "$NAME was lost; run brings it back and goes on"
  code=3
fi
exit "$code"
