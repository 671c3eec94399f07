"""memplan inside other libraries' training loops. Nothing of memplan imports these files before they are asked for."""
