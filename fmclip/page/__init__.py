"""What stands behind the page in app.py: visitors, uploads, example cases, words and pictures. No layout in here."""
