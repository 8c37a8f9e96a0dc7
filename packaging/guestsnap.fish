# Completion of guestsnap(8) for fish.
set -l commands list plan inspect ls cat who check sweep
set -l none "not __fish_seen_subcommand_from $commands help"
complete -c guestsnap -f
complete -c guestsnap -n $none -a list -d 'Logical volumes and guests of this host'
complete -c guestsnap -n $none -a plan -d 'What a Plugin line selects'
complete -c guestsnap -n $none -a inspect -d 'What is on the disks of a guest, and what is saved of it'
complete -c guestsnap -n $none -a ls -d 'What is in a folder of a guest'
complete -c guestsnap -n $none -a cat -d 'A file of a guest'
complete -c guestsnap -n $none -a who -d 'Who holds the disks of a guest'
complete -c guestsnap -n $none -a check -d 'Whether a job could run'
complete -c guestsnap -n $none -a sweep -d 'Removes what jobs that are gone left behind'
complete -c guestsnap -n $none -a help -d 'The help of a command'
complete -c guestsnap -n '__fish_seen_subcommand_from help' -a "$commands"
complete -c guestsnap -n '__fish_seen_subcommand_from sweep' -l dry-run -d 'Only say what would be removed'
complete -c guestsnap -n 'not __fish_seen_subcommand_from cat' -l json -d 'Print JSON'
complete -c guestsnap -l client-file -r -F -d 'The client file'
complete -c guestsnap -l working-dir -x -a '(__fish_complete_directories)' -d 'Working directory of bacula-fd'
complete -c guestsnap -s h -l help -d 'Help'
complete -c guestsnap -n $none -s V -l version -d 'Version'
