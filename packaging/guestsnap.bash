# Completion of guestsnap(8) for bash.
_guestsnap() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    case $before in
        --client-file) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --working-dir) mapfile -t COMPREPLY < <(compgen -d -- "$word"); return ;;
        sweep) mapfile -t COMPREPLY < <(compgen -W --dry-run -- "$word"); return ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "list plan inspect check sweep \
        --json --client-file --working-dir --help --version" -- "$word")
}
complete -F _guestsnap guestsnap
