from farpage.nbd.directpath import DirectPath as DirectPath
