# Completion of guestsnap(8) for bash. Paths in a guest are not completed: that would take snapshots.
# The shell expands the words that it is given: names with other characters are left out.
_guestsnap_guests() {
    guestsnap --json list 2> /dev/null | sed -n 's/^ *"name": "\([A-Za-z0-9._+-]*\)",\{0,1\}$/\1/p'
}
_guestsnap() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    local commands='list plan inspect ls cat who check status rebuild sweep' given='' i
    case $before in
        --client-file) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        rebuild) mapfile -t COMPREPLY < <(compgen -d -- "$word"); return ;;
        --disk|--definition) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --working-dir) mapfile -t COMPREPLY < <(compgen -d -- "$word"); return ;;
    esac
    for ((i = 1; i < COMP_CWORD; i++)); do
        case " $commands help " in
            *" ${COMP_WORDS[i]} "*) given=${COMP_WORDS[i]}; break ;;
        esac
    done
    local words='--json --client-file --working-dir --help'
    case $given in
        '') words="$commands $words --version" ;;
        help) words=$commands ;;
        cat) words='--client-file --working-dir --help' ;;
        ls) words="-l --recursive $words" ;;
        status) words="--max-age $words" ;;
        rebuild) words="--disk --size --plan --wipe --definition $words" ;;
        sweep) words="--dry-run $words" ;;
    esac
    case $given in
        inspect|who) words="$words $(_guestsnap_guests)" ;;
        ls|cat)
            words="$words $(_guestsnap_guests | sed 's|$|:/|')"
            compopt -o nospace 2> /dev/null ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -F _guestsnap guestsnap
