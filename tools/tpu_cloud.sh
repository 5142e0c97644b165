# Functions of launch_tpu.sh: the TPU, its workers, how a run ends. They read the variables of its
# options; $state is the folder of this TPU, $errors what gcloud last complained of.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # launch_tpu.sh sets and reads them
# shellcheck disable=SC2086  # the variables of flags are words

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&3; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
wrong() { printf 'launch_tpu.sh: error: %s (--help lists the options)\n' "$*" >&2; exit 2; }
once() { [ "$*" = "$said_once" ] || say "$*"; said_once=$*; }
here() { echo "./launch_tpu.sh $1 --name $name --zone $zone --project $project"; }
kept() { cat "$state/$1" 2>/dev/null || true; }
keep() { [ -n "$dry_run" ] || echo "$2" >"$state/$1"; }
forget() { [ -n "$dry_run" ] || rm -f "$state/$1"; }
pause() { [ -n "$dry_run" ] || { sleep "$poll" >/dev/null 2>&1 3>&- & wait $!; }; }

quoted() {  # ARGUMENT...: each with a space before it, as a shell reads it
  local a
  for a in "$@"; do
    case $a in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) printf " '%s'" "$(printf %s "$a" | sed "s/'/'\\\\''/g")" ;;
      *) printf ' %s' "$a" ;;
    esac
  done
}

retry() {  # COMMAND...: with growing pauses
  local i seconds=$backoff
  for ((i = 1; ; i++)); do
    "$@" && return
    say "${*:1:2} failed ($i of $retries): $(complaint)"
    ((i < retries)) || return 1
    sleep "$seconds" && seconds=$((2 * seconds))
  done
}

# --- the TPU

cloud() {
  if [ -n "$dry_run" ]; then printf '+%s\n' "$(quoted gcloud "$@")" >&3; return; fi
  gcloud "$@" </dev/null 2>"$errors"
}
complaint() {  # one line of it: from gcloud's ERROR on, or the last lines
  { sed -n '/ERROR/,$p' "$errors" | grep . || tail -n 3 "$errors"; } | tr -s '\n ' ' ' | cut -c1-250
}
missing() { grep -qiE 'not.?found|no objects' "$errors"; }

asked() {  # queued-resources|tpu-vm FORMAT ASSUMED_IN_A_DRY_RUN; NONE where there is none
  if cloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)"; then
    [ -z "$dry_run" ] || echo "$3"
  elif missing; then echo NONE
  else echo UNKNOWN; fi
}
request() { asked queued-resources state.state "$assumed"; }
node() { asked tpu-vm 'state,networkEndpoints.len()' 'READY 1'; }

create() {
  local of_tier=()
  [ "$tier" = on-demand ] || of_tier=("--$tier")
  say "asks for $name: $type in $zone, $tier, image $image"
  cloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$image" --labels=launched_by=coda_jax \
    ${of_tier[@]+"${of_tier[@]}"} $create_flags || return 1
  assumed=ACTIVE
  keep type "$type" && keep tier "$tier" && keep image "$image"
}

delete() {
  [ -n "$(kept image)" ] ||
    [ "$(asked queued-resources 'tpu.nodeSpec[0].node.labels.launched_by' coda_jax)" = coda_jax ] ||
    die "$name was not made by this script and stays; to delete it:$(quoted gcloud "${remove[@]}")"
  retry delete_request || die "$name could not be deleted: $(complaint)"
  assumed=NONE
}
delete_request() { cloud "${remove[@]}" || missing; }

ready() {  # makes the TPU if it is not there, and waits until its workers are READY
  local now message
  while :; do
    now=$(request)
    if [ "$now" = ACTIVE ]; then
      read -r now workers <<<"$(node)"
      now="ACTIVE, node $now"
    fi
    [ "$shown$now" != UNKNOWN ] || die "gcloud: $(complaint)"
    [ "$now" = "$shown" ] || say "$name: $now$([[ $now != *UNKNOWN ]] || echo ", $(complaint)")"
    shown=$now
    case $now in
      'ACTIVE, node READY') return ;;
      NONE)
        ! finished_before || complete
        create && continue
        message=$(complaint)
        if grep -qiE 'quota|resource_exhausted' "$errors"; then
          message="quota exceeded: $message(more: console, IAM > Quotas; or another type, zone or tier)"
          [ -n "$(kept image)" ] || give_up "$message"  # never had it: asking again does not help
        fi
        failure "$name was not created: $message" ;;
      FAILED)
        failure "$name FAILED: $(asked queued-resources state.failedData.error.message '')"
        delete ;;
      SUSPENDED | *PREEMPTED | *TERMINATED | *STOPPED | *NONE)  # it never comes back
        ! finished_before || complete
        preemption "$name is $now"
        delete ;;
    esac  # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, node CREATING, UNKNOWN...: wait
    pause
  done
}

there() {
  local now
  read -r now workers <<<"$(node)"
  [ "$now" = READY ] ||
    die "$name is $now, not READY; $(here up) makes it or waits for it $(complaint)"
}

# --- the workers

on_workers() {  # COMMAND: prints the workers' lines; every worker has to answer '@worker HOST ...'
  local said
  said=$(cloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all $ssh_flags \
    --command="$1") || return 1
  if [ -z "$dry_run" ] && [ "$(grep -c ^@worker <<<"$said")" -lt "$workers" ]; then
    printf '%s\n' "$said" >&3
    return 1
  fi
  printf '%s\n' "$said"
}
task() { on_workers "bash coda_jax/tools/tpu_worker.sh$(quoted "$@")"; }
upload() {
  cloud compute tpus tpu-vm scp "$state/checkout.tgz" "$name:coda_checkout.tgz" "${where[@]}" \
    --worker=all $scp_flags >/dev/null
}
unpack() {
  on_workers "mkdir -p coda_jax && rm -rf coda_jax/coda_jax coda_jax/configs coda_jax/convert &&
    tar -xzf coda_checkout.tgz -C coda_jax &&
    bash coda_jax/tools/tpu_worker.sh install$(quoted "$extras" "$python")" >/dev/null
}

pack() {  # what git tracks and what is new, not what it ignores
  say "packs this checkout"
  local list=(git ls-files -z --cached --others --exclude-standard) file megabytes
  git rev-parse 2>/dev/null ||
    list=(find . -type d \( -name .venv -o -name .git -o -name runs \) -prune -o -type f -print0)
  if [ -n "$dry_run" ]; then
    echo "+$(quoted "${list[@]}") | tar -czf $state/checkout.tgz --null -T -" >&3
    return
  fi
  megabytes=$({ "${list[@]}" | xargs -0 du -k 2>/dev/null || true; } |
    awk '{ n += $1 } END { print int(n / 1024) }')
  ((megabytes <= max_pack)) ||
    die "the checkout has $megabytes MB, more than --max-pack=$max_pack: .gitignore what should stay"
  "${list[@]}" | while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    COPYFILE_DISABLE=1 tar -czf "$state/checkout.tgz" --null -T -
}
install() {  # after a preemption the checkout of before, not what was changed since
  [ -e "$state/checkout.tgz" ] || pack
  say "installs it on all workers ($workers)"
  retry upload && retry unpack
}

start() {
  local before=run
  [ -n "$dry_run$(kept started)" ] || ! finished || before=result  # of a run that now gets longer
  say "starts on all workers ($workers):$(quoted "${command[@]}")"
  # Written before, so that a babysitter that is killed here is taken up again.
  [ -n "$dry_run" ] || printf '%s\0' "${command[@]}" >"$state/command"
  [ -n "$(kept started)" ] || keep started "$before"
  keep artefact "$artefact" && keep shared_workdir "$shared_workdir"
  retry task start "${command[@]}" >/dev/null || return 1
  assumed_verdict=0 again=
}

look() {  # sets verdict: bare, none, running, stopped, lost or an exit code; fails if one is silent
  local said
  # shellcheck disable=SC2016  # the VM's shell expands it
  said=$(on_workers 'if [ -f coda_jax/tools/tpu_worker.sh ]; then
    bash coda_jax/tools/tpu_worker.sh state; else echo "@worker $(hostname) bare"; fi') || return 1
  # A worker that is killed ends the others with 75, and a restarted VM is none that failed.
  verdict=$assumed_verdict
  [ -n "$dry_run" ] || verdict=$(awk '
    $1 == "@worker" { n[$3]++; if ($3 == "ended" && $4 != 0) { n[$4]++; if ($4 != 75) code = $4 } }
    END { split("bare none stopped 2 lost", first)
      for (i = 1; i <= 5; i++) if (first[i] in n) { print first[i]; exit }
      print code ? code : 75 in n ? 75 : "running" in n ? "running" : 0 }' <<<"$said")
}

finished() {  # 0: an artefact is there, 1: none is, 2: no answer
  local a said
  case ${artefacts[0]:-} in
    '') return 1 ;;
    gs://*)
      for a in "${artefacts[@]}"; do
        cloud storage ls "$a" --project="$project" >/dev/null && return
        missing || return 2
      done
      return 1 ;;
  esac
  said=$(on_workers "cd coda_jax && ls$(quoted "${artefacts[@]}") 2>/dev/null; echo @worker") ||
    return 2
  [ -n "$dry_run" ] || grep -q '^[^@]' <<<"$said"
}
finished_before() { [ "$(kept started)" = run ] && [[ ${artefacts[0]:-} = gs://* ]] && finished; }

# --- ends

costs() { [ -n "$dry_run" ] || say "$name is there and costs money until: $(here down)"; }
complete() {
  say "done${workdir:+: the result is in $workdir}"
  forget started
  if [ -n "$down" ]; then say "deletes $name" && delete; else costs; fi
  exit 0
}
give_up() {
  [ "$subcommand" != babysit ] || [ -z "$down" ] || { say "deletes $name" && delete; }
  die "gave up: $* (what costs money: $(here status))"
}
bump() { keep "$1" $(($(kept "$1") + 1)) && kept "$1"; }
failure() {
  local n
  n=$(bump failures)
  say "failure $n of $max_failures: $*"
  ((n < max_failures)) || give_up "$*"
}
preemption() {
  local n
  n=$(bump preemptions)
  say "preemption $n: $*"
  ((n < max_preemptions)) || give_up "$n preemptions"
}
last_lines() { { task log 20 | grep -v ^@worker | head -n 100 >&3; } || true; }
