# Completion of guestsnap(8) for fish.
set -l commands list plan inspect ls cat who check status rebuild sweep
set -l none "not __fish_seen_subcommand_from $commands help"
complete -c guestsnap -f
complete -c guestsnap -n $none -a list -d 'Logical volumes and guests of this host'
complete -c guestsnap -n $none -a plan -d 'Guests that a Plugin line selects'
complete -c guestsnap -n $none -a inspect -d 'Disks of a guest, saved and skipped volumes'
complete -c guestsnap -n $none -a ls -d 'List a directory of a guest'
complete -c guestsnap -n $none -a cat -d 'Print a file of a guest'
complete -c guestsnap -n $none -a who -d 'Holders of the disks of a guest'
complete -c guestsnap -n $none -a check -d 'Test whether a job could run'
complete -c guestsnap -n $none -a status -d 'When each guest was last saved'
complete -c guestsnap -n '__fish_seen_subcommand_from status' -l max-age -x -d 'Hours'
complete -c guestsnap -n $none -a rebuild -d 'Disks of a lost guest from the kit in its backup'
complete -c guestsnap -n '__fish_seen_subcommand_from rebuild' -a '(__fish_complete_directories)'
complete -c guestsnap -n '__fish_seen_subcommand_from rebuild' -l disk -r -F -d 'Image, VG/LV or VG/POOL/LV'
complete -c guestsnap -n '__fish_seen_subcommand_from rebuild' -l size -x -d 'Larger size, as 40G'
complete -c guestsnap -n '__fish_seen_subcommand_from rebuild' -l plan -d 'Show it, make nothing'
complete -c guestsnap -n '__fish_seen_subcommand_from rebuild' -l wipe -d 'Empty what is there'
complete -c guestsnap -n '__fish_seen_subcommand_from rebuild' -l definition -r -F -d 'Write its definition here'
complete -c guestsnap -n $none -a sweep -d 'Remove leftovers of dead jobs'
complete -c guestsnap -n $none -a help -d 'Help of a command'
complete -c guestsnap -n '__fish_seen_subcommand_from help' -a "$commands"
# Paths in a guest are not completed: that would take snapshots.
function __guestsnap_guests
    guestsnap --json list 2>/dev/null | sed -n 's/^ *"name": "\([A-Za-z0-9._+-]*\)",\{0,1\}$/\1/p'
end
complete -c guestsnap -n '__fish_seen_subcommand_from inspect who' -a '(__guestsnap_guests)'
complete -c guestsnap -n '__fish_seen_subcommand_from ls cat' -a '(__guestsnap_guests | sed "s|\$|:/|")'
complete -c guestsnap -n '__fish_seen_subcommand_from ls' -s l -d 'Long lines'
complete -c guestsnap -n '__fish_seen_subcommand_from ls' -s R -l recursive -d 'All below'
complete -c guestsnap -n '__fish_seen_subcommand_from sweep' -l dry-run -d 'List leftovers, remove nothing'
complete -c guestsnap -n 'not __fish_seen_subcommand_from cat' -l json -d 'Print JSON'
complete -c guestsnap -l client-file -r -F -d 'Client file'
complete -c guestsnap -l working-dir -x -a '(__fish_complete_directories)' -d 'Working directory of bacula-fd'
complete -c guestsnap -s h -l help -d 'Help'
complete -c guestsnap -n $none -s V -l version -d 'Version'
