"""What every command shares: exit codes, progress, files that appear whole or not at all."""
