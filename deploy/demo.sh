# What `make demo` runs once the cluster is ready; `twostroke serve` has put the router's address in the environment.
set -e
ask() {
    printf '\n> %s\n' "$1"
    .venv/bin/twostroke generate "$1"
}
ask "Name three primary colors."
ask "Explain in one sentence why the sky is blue."
