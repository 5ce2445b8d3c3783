"""What a server of predictions needs beside drawing; everybody may import it."""
