"""What Cog's command-line tool does, on this machine."""
